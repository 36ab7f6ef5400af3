"""Rank and world size of this process, from its launcher's environment variables (read here and nowhere else)."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from sora_train.core.cli import InputError

_TASKS = {  # variables with the number of tasks, and the launcher that sets each
    "SLURM_STEP_NUM_TASKS": "srun", "OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpirun",
    "MV2_COMM_WORLD_SIZE": "mpirun", "JSM_NAMESPACE_SIZE": "jsrun", "FLUX_JOB_SIZE": "flux run",
    "HOROVOD_SIZE": "horovodrun",
}  # fmt: skip
_PLACES = {  # variables with the index of a task, and the launcher that sets each
    "SLURM_PROCID": "srun", "OMPI_COMM_WORLD_RANK": "mpirun", "PMI_RANK": "mpirun", "PMIX_RANK": "mpirun or srun",
    "MV2_COMM_WORLD_RANK": "mpirun", "PALS_RANKID": "aprun", "ALPS_APP_PE": "aprun",
    "LOCAL_RANK": "a launcher",
}  # fmt: skip
_PORTS = 1 << 16


@dataclass(frozen=True)
class World:
    """Rank of this process in the job and on its node; a single process is rank 0 of 1."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    restarts: int = 0  # automatic restarts so far, by torchrun or the launch script
    sequence: int = 1  # degree of sequence parallelism: number of consecutive ranks that share the tokens of a pack

    @property
    def is_main(self) -> bool:
        """True on rank 0, which logs and writes for the whole job."""
        return self.rank == 0

    @property
    def sequence_rank(self) -> int:
        """Rank within the sequence-parallel group, which is the index of this rank's part of the tokens."""
        return self.rank % self.sequence

    @property
    def data_rank(self) -> int:
        """Number of this rank's sequence-parallel group; the ranks of a group get the same packs."""
        return self.rank // self.sequence

    @property
    def data_size(self) -> int:
        """Number of sequence-parallel groups: the data-parallel degree."""
        return self.size // self.sequence

    def with_sequence(self, degree: int) -> World:
        """Copy with sequence-parallel groups of `degree` ranks. Raises InputError if they don't divide the ranks."""
        if self.size % degree:
            raise InputError(f"parallel.sequence={degree} doesn't divide the {self.size} rank(s)")
        return replace(self, sequence=degree)

    def sharing(self, most: int) -> int:
        """Largest number of consecutive ranks of a machine that can share a pack of up to `most` slots.

        It is a power of two that divides the number of ranks per machine, so that no group spans two machines.
        """
        degree = 1
        while 2 * degree <= most and self.size % (2 * degree) == 0 and self.local_size % (2 * degree) == 0:
            degree *= 2
        return degree

    @property
    def launched(self) -> bool:
        """True if a launcher started this process and set the address at which the ranks connect."""
        return "TORCHELASTIC_RUN_ID" in os.environ or self.size > 1


def from_environment() -> World:
    """Read rank and world size from the environment; without these variables (plain `python -m`) it is rank 0 of 1.

    The variables are RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE (or LOCAL_SIZE, as DeepSpeed's launcher calls it),
    MASTER_ADDR and MASTER_PORT. torchrun, `accelerate launch`, DeepSpeed's launcher and the training operators of
    Kubernetes set them.

    Raises:
        InputError: The values are incomplete or contradict each other, or srun or mpirun started several tasks without
            them. Each process would then train by itself.
    """
    env = os.environ
    if "WORLD_SIZE" not in env and "RANK" not in env:
        _refuse_lone_task()
    try:
        world = World(
            rank=int(env.get("RANK", 0)),
            size=int(env.get("WORLD_SIZE", 1)),
            local_rank=int(env.get("LOCAL_RANK", 0)),
            local_size=int(env.get("LOCAL_WORLD_SIZE", env.get("LOCAL_SIZE", 1))),
            restarts=int(env.get("TORCHELASTIC_RESTART_COUNT", 0)) + int(env.get("SORA_RESTARTS", 0)),
        )
    except ValueError as error:
        raise InputError(f"RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE must be whole numbers: {error}") from error
    said = f"RANK={env.get('RANK', '')} and WORLD_SIZE={env.get('WORLD_SIZE', '')} are set in the environment"
    if not 0 <= world.rank < world.size:
        raise InputError(f"{said}, which is no rank of so many; unset them, or start with torchrun")
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not env.get(name)]
    if world.size > 1 and missing:
        raise InputError(
            f"{said}, but not {' and '.join(missing)}, so the ranks can't meet; unset them for one process alone, or "
            "start with torchrun"
        )
    if world.local_rank < 0 or ("LOCAL_WORLD_SIZE" in env and world.local_rank >= world.local_size):
        raise InputError(f"LOCAL_RANK={world.local_rank} is no rank of the {world.local_size} on this machine")
    port = env.get("MASTER_PORT", "")
    if world.size > 1 and not (port.isdecimal() and 0 < int(port) < _PORTS):
        raise InputError(f"MASTER_PORT={port} in the environment must be a whole number from 1 to {_PORTS - 1}")
    return world


def threads_here(world: World) -> int:
    """CPU threads of this rank: OMP_NUM_THREADS, or its share of the machine's cores.

    torchrun sets OMP_NUM_THREADS=1 if it isn't set and a machine has several ranks. A 1 is therefore ignored with
    several ranks.
    """
    said = os.environ.get("OMP_NUM_THREADS", "")
    if said.isdigit() and int(said) > 0 and not (said == "1" and world.local_size > 1):
        return int(said)
    return max(1, len(os.sched_getaffinity(0)) // world.local_size)


def _refuse_lone_task() -> None:
    """Raise InputError if srun, mpirun or another launcher started several tasks, since each would be a separate run.

    Also raise it for `accelerate launch --cpu`, which starts a single process although several were requested.
    """
    if "ACCELERATE_USE_CPU" in os.environ and os.environ.get("MASTER_ADDR"):
        raise InputError(
            "accelerate started one process where several were asked for, as it does on CPUs; start with torchrun, or "
            "ask it for one (--num_processes 1)"
        )
    said = [f"{launcher} started {os.environ[name]} tasks ({name})" for name, launcher in _TASKS.items()
            if os.environ.get(name, "") not in ("", "0", "1")]  # fmt: skip
    said += [f"{launcher} started several tasks ({name}={os.environ[name]})" for name, launcher in _PLACES.items()
             if os.environ.get(name, "") not in ("", "0")]  # fmt: skip
    if said:
        raise InputError(
            f"{said[0]}, each of which would run alone; let it start one torchrun on each machine, as "
            "launch/slurm.sbatch does"
        )
