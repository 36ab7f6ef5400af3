"""A process knows its place among the ranks of its launcher, or is refused: it never trains alone by mistake."""

from __future__ import annotations

import pytest

from sora_train.core.cli import InputError
from sora_train.core.world import World, from_environment, threads_here

_NAMES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT",
    "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "SORA_RESTARTS", "SLURM_STEP_NUM_TASKS",
    "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "OMP_NUM_THREADS", "ACCELERATE_USE_CPU", "MV2_COMM_WORLD_SIZE",
    "JSM_NAMESPACE_SIZE", "FLUX_JOB_SIZE", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK",
    "MV2_COMM_WORLD_RANK", "PALS_RANKID", "ALPS_APP_PE",
)  # fmt: skip
MEETING = {"MASTER_ADDR": "a", "MASTER_PORT": "1"}


def place(monkeypatch: pytest.MonkeyPatch, **variables: str) -> World:
    for name in _NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return from_environment()


def test_each_launcher_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = place(monkeypatch)
    assert (alone.rank, alone.size, alone.launched) == (0, 1, False)
    batch_script = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1", "OMPI_COMM_WORLD_SIZE": "1"}
    assert place(monkeypatch, **batch_script) == alone
    torchrun = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}
    assert place(monkeypatch, **torchrun, **MEETING) == World(3, 4, 1, 2)
    deepspeed = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}
    assert place(monkeypatch, **deepspeed, **MEETING) == World(1, 2, 1, 2) and from_environment().launched
    operator = place(monkeypatch, RANK="1", WORLD_SIZE="2", **MEETING)
    assert operator == World(1, 2, 0, 1) and operator.launched


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"RANK": "0", "WORLD_SIZE": "4"}, "WORLD_SIZE=4 are set .*, but not MASTER_ADDR and MASTER_PORT"),
        ({"WORLD_SIZE": "4", **MEETING}, "RANK= and WORLD_SIZE=4 are set .*, but not RANK,"),
        ({"RANK": "4", "WORLD_SIZE": "4", **MEETING}, "no rank of so many"),
        ({"RANK": "one", "WORLD_SIZE": "4", **MEETING}, "must be whole numbers"),
        ({"SLURM_STEP_NUM_TASKS": "8"}, "srun started 8 tasks .*, each of which would run alone"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "mpirun started 2 tasks"),
        ({"JSM_NAMESPACE_SIZE": "6"}, "jsrun started 6 tasks"),
        ({"FLUX_JOB_SIZE": "2"}, "flux run started 2 tasks"),
        ({"HOROVOD_SIZE": "2", "HOROVOD_RANK": "0"}, "horovodrun started 2 tasks"),
        ({"LOCAL_RANK": "1"}, r"a launcher started several tasks \(LOCAL_RANK=1\)"),
        (
            {"RANK": "1", "WORLD_SIZE": "2", **MEETING, "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"},
            "LOCAL_RANK=2 is no rank of the 2 on this machine",
        ),
        ({"RANK": "1", "WORLD_SIZE": "2", **MEETING, "MASTER_PORT": "99999"}, "MASTER_PORT=99999 .* from 1 to 65535"),
        ({"RANK": "1", "WORLD_SIZE": "2", **MEETING, "MASTER_PORT": "tcp"}, "MASTER_PORT=tcp .* whole number"),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, r"srun started several tasks \(SLURM_PROCID=1\), each of which"),
        ({"PMIX_RANK": "3"}, "started several tasks"),
        ({"ACCELERATE_USE_CPU": "True", **MEETING}, "accelerate started one process where several were asked for"),
    ],
)
def test_what_would_train_alone_is_refused(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        place(monkeypatch, **variables)


def test_threads_are_those_of_openmp_but_for_torchruns_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: range(8))
    for said, local, threads in (("", 2, 4), ("1", 1, 1), ("1", 2, 4), ("3", 2, 3), ("many", 1, 8)):
        monkeypatch.setenv("OMP_NUM_THREADS", said)
        assert threads_here(World(size=local, local_size=local)) == threads
