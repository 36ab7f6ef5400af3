"""The launch scripts, with stand-ins for torchrun, srun and scontrol."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted([*ROOT.glob("launch/*.*sh"), *ROOT.glob("launch/*.sbatch"), ROOT / ".ci/run"])

# Notes how it was called, says where it writes as local rank 0 does, and exits with 1 whatever the run's code, as
# torchrun does. On another machine than this one (FAR), rank 0 writes exit.json.
TORCHRUN = """#!/usr/bin/env bash
echo "$@" >>"$CALLS"
echo "before $(stat -c '%i %.9Y' "$RUN_DIR/exit.json" 2>/dev/null | tr -d .)" >>"$SORA_EXIT_FILE"
echo "run_dir $RUN_DIR" >>"$SORA_EXIT_FILE"
if [[ -n $RUN_CODE ]]; then
    [[ -n $FAR ]] || echo "code $RUN_CODE" >>"$SORA_EXIT_FILE"
    mkdir -p "$RUN_DIR"
    printf '{\\n  "code": %s,\\n  "reason": "code 7"\\n}\\n' "$RUN_CODE" >"$RUN_DIR/exit.json.new"
    mv "$RUN_DIR/exit.json.new" "$RUN_DIR/exit.json"
fi
exit 1
"""
# Saves when it is told to stop, which takes a moment.
STOPPABLE = """#!/usr/bin/env bash
trap 'echo SIGNAL >>"$CALLS"; sleep 0.5; echo "code 75" >>"$SORA_EXIT_FILE"; exit 1' USR1 TERM
echo started >>"$CALLS"
while true; do sleep 0.1; done
"""
SRUN = """#!/usr/bin/env bash
echo "srun $@" >>"$CALLS"
exit "$RUN_CODE"
"""
SCONTROL = """#!/usr/bin/env bash
if [[ $1 == show ]]; then printf 'node-a\\nnode-b\\n'; else echo "scontrol $@" >>"$CALLS"; fi
"""


class Sandbox:
    """A copy of the launch scripts, without an environment of its own, and a PATH with stand-ins first."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run_dir = folder / "run"
        self.calls_file = folder / "calls"
        shutil.copytree(ROOT / "launch", folder / "launch")
        (folder / "bin").mkdir()
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("SORA_", "SLURM_"))}
        self.environment = inherited | {
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "CALLS": str(self.calls_file),
            "RUN_DIR": str(self.run_dir),
            "RUN_CODE": "",
            "FAR": "",
        }

    def stand_in(self, name: str, text: str) -> None:
        path = self.folder / "bin" / name
        path.write_text(text)
        path.chmod(0o755)

    def start(self, script: str, *arguments: str, **environment: str) -> subprocess.Popen[bytes]:
        command = ["bash", str(self.folder / "launch" / script), *arguments, f"run_dir={self.run_dir}"]
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env=self.environment | environment,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a test run in the background ignores it
        )

    def code(self, script: str, *arguments: str, **environment: str) -> int:
        return self.start(script, *arguments, **environment).wait(timeout=250)

    def calls(self) -> list[str]:
        return self.calls_file.read_text().splitlines() if self.calls_file.exists() else []

    def wait_for(self, call: str) -> None:
        end = time.monotonic() + 200
        while call not in self.calls():
            assert time.monotonic() < end, f"{call!r} never came; calls: {self.calls()}"
            time.sleep(0.05)


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    box = Sandbox(tmp_path)
    box.stand_in("torchrun", TORCHRUN)
    box.stand_in("srun", SRUN)
    box.stand_in("scontrol", SCONTROL)
    return box


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_parses(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert script.read_text().startswith("#!/usr/bin/env bash\n") or script.name in ("common.sh", "completion.bash")


@pytest.mark.parametrize("far", ["", "yes"])
@pytest.mark.parametrize("code", [0, 2, 75])
def test_torchrun_returns_the_code_of_the_run(sandbox: Sandbox, code: int, far: str) -> None:
    given = {"MAX_RESTARTS": "5", "RUN_CODE": str(code), "FAR": far}
    assert sandbox.code("torchrun.sh", "NPROC=3", "experiment=demo", **given) == code
    (call,) = sandbox.calls()  # none of these is started again
    assert "--nproc-per-node 3" in call
    assert "--signals-to-handle SIGTERM,SIGINT,SIGUSR1" in call
    assert call.endswith(f"-m sora_train.train experiment=demo run_dir={sandbox.run_dir}")


def test_torchrun_ignores_the_exit_file_of_an_earlier_run(sandbox: Sandbox) -> None:
    sandbox.run_dir.mkdir()
    (sandbox.run_dir / "exit.json").write_text('{"code": 0, "reason": "done"}')
    assert sandbox.code("torchrun.sh") == 1


def test_torchrun_restarts_after_a_failure(sandbox: Sandbox) -> None:
    assert sandbox.code("torchrun.sh", "MAX_RESTARTS=2", RUN_CODE="1") == 1
    assert len(sandbox.calls()) == 3


@pytest.mark.parametrize("stop", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_torchrun_waits_for_the_save(sandbox: Sandbox, stop: signal.Signals) -> None:
    sandbox.stand_in("torchrun", STOPPABLE)
    process = sandbox.start("torchrun.sh", MAX_RESTARTS="5")
    sandbox.wait_for("started")
    os.killpg(process.pid, stop)  # as a terminal does, and a second time while it saves
    sandbox.wait_for("SIGNAL")
    os.killpg(process.pid, stop)
    assert process.wait(timeout=200) == 75
    assert sandbox.calls() == ["started", "SIGNAL"]


def test_multinode_names_a_missing_setting(sandbox: Sandbox, capfd: pytest.CaptureFixture[str]) -> None:
    assert sandbox.code("multinode.sh", NNODES="2", MASTER_ADDR="node-a", RUN_ID="") == 2
    assert "RUN_ID is not set" in capfd.readouterr().err


def test_runs_that_start_on_one_machine_meet_at_ports_of_their_own(sandbox: Sandbox) -> None:
    for name in ("x", "y", "x"):
        sandbox.code("multinode.sh", RUN_CODE="0", NNODES="1", MASTER_ADDR="node-a", RUN_ID=name)
    first, second, again = (re.search(r"node-a:2(\d{4}) ", call) for call in sandbox.calls())
    assert first and second and again and first[1] != second[1] and first[1] == again[1]


def test_gpus_that_are_hidden_are_not_counted(sandbox: Sandbox) -> None:
    for visible, processes in (("-1", 2), ("", 2), ("0,1,-1,2", 2), ("0,1,2", 3)):
        sandbox.calls_file.unlink(missing_ok=True)
        sandbox.code("torchrun.sh", RUN_CODE="0", CUDA_VISIBLE_DEVICES=visible)
        assert f"--nproc-per-node {processes} " in sandbox.calls()[0]


def test_no_file_is_left_in_the_temporary_folder(sandbox: Sandbox) -> None:
    (sandbox.folder / "tmp").mkdir()
    assert sandbox.code("torchrun.sh", RUN_CODE="2", TMPDIR=str(sandbox.folder / "tmp")) == 2
    assert not list((sandbox.folder / "tmp").iterdir())


def test_multinode_meets_at_the_master(sandbox: Sandbox) -> None:
    settings = {"NNODES": "1:2", "MASTER_ADDR": "node-a", "MASTER_PORT": "1234", "RUN_ID": "x"}
    assert sandbox.code("multinode.sh", RUN_CODE="75", **settings) == 75
    (call,) = sandbox.calls()
    assert "--nnodes 1:2" in call and "--rdzv-endpoint node-a:1234 --rdzv-id x" in call


def test_nccl_and_the_allocator_get_their_settings_and_keep_those_that_are_set(sandbox: Sandbox) -> None:
    names = "NCCL_DEBUG GLOO_SOCKET_IFNAME NCCL_SOCKET_IFNAME PYTORCH_ALLOC_CONF TORCH_NCCL_DUMP_ON_TIMEOUT"
    sandbox.stand_in("torchrun", f'#!/usr/bin/env bash\nfor n in {names}; do echo "$n=${{!n}}" >>"$CALLS"; done\n')
    settings = {"NNODES": "2", "MASTER_ADDR": "a", "RUN_ID": "x", "INTERFACE": "eth7", "NCCL_DEBUG": "INFO"}
    assert sandbox.code("multinode.sh", **settings) == 0
    assert sandbox.calls() == [
        "NCCL_DEBUG=INFO", "GLOO_SOCKET_IFNAME=eth7", "NCCL_SOCKET_IFNAME=eth7",
        "PYTORCH_ALLOC_CONF=expandable_segments:True", "TORCH_NCCL_DUMP_ON_TIMEOUT=1",
    ]  # fmt: skip


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (1, False), (2, False), (75, True)])
def test_slurm_requeues_only_what_was_stopped(sandbox: Sandbox, code: int, requeued: bool) -> None:
    slurm = {
        "SLURM_JOB_ID": "42",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node-[a-b]",
        "SLURM_SUBMIT_DIR": str(sandbox.folder),
    }
    assert sandbox.code("slurm.sbatch", "experiment=demo", RUN_CODE=str(code), **slurm) == code
    assert sandbox.calls()[0].startswith("srun --nodes 2 ")
    assert ("scontrol requeue 42" in sandbox.calls()) == requeued


def test_stale_build_lock_is_removed_and_a_held_one_is_not(sandbox: Sandbox) -> None:
    extensions = sandbox.folder / "extensions"
    for name in ("stale", "held"):
        (extensions / name).mkdir(parents=True)
        (extensions / name / "lock").touch()
    with (extensions / "held" / "lock").open():
        sandbox.code("torchrun.sh", TORCH_EXTENSIONS_DIR=str(extensions))
        assert not (extensions / "stale" / "lock").exists()
        assert (extensions / "held" / "lock").exists()


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("python -m sora_train.train model=1", {"model=100m", "model=14b", "model=1b3"}),
        ("./launch/torchrun.sh NPROC=1 optim.lr_sc", set()),  # there is no such key
        ("./launch/torchrun.sh experiment=demo optim.wei", {"optim.weight_decay="}),
        ("python other.py experiment=dem", set()),
    ],
)
def test_the_shell_completes(line: str, found: set[str]) -> None:
    words = " ".join(f"'{word}'" for word in line.split())
    script = f"""source launch/completion.bash
COMP_LINE='{line}' COMP_POINT={len(line)} COMP_WORDS=({words}) COMP_CWORD={len(line.split()) - 1}
_sora_train_complete
printf '%s\\n' "${{COMPREPLY[@]}}"
complete -p python torchrun.sh >&2
"""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == found
    assert done.stderr.count("_sora_train_complete") == 2


def test_quickstart_takes_no_arguments(sandbox: Sandbox) -> None:
    assert sandbox.code("quickstart.sh") == 2


def test_setup_refuses_an_old_python(sandbox: Sandbox, capfd: pytest.CaptureFixture[str]) -> None:
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, sandbox.folder)
    sandbox.stand_in("old-python", '#!/usr/bin/env bash\n[[ $1 == --version ]] && echo "Python 3.9.1"\n')
    assert sandbox.code("setup.sh", SORA_PYTHON="old-python") == 2
    assert "Python 3.9.1; 3.11 or newer is needed" in capfd.readouterr().err


def test_a_second_setup_does_nothing(sandbox: Sandbox) -> None:
    venv = sandbox.folder / ".venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin/python").write_text("#!/bin/sh\nexit 9\n")
    (venv / "bin/python").chmod(0o755)
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, sandbox.folder)
    made_from = f'(echo "{sandbox.folder} {venv}" && cat pyproject.toml constraints.txt) | sha256sum >.venv/.sora-setup'
    subprocess.run(["bash", "-c", made_from], cwd=sandbox.folder, check=True)
    before = sorted(path.name for path in venv.iterdir())
    assert sandbox.code("setup.sh", SORA_PYTHON="none") == 0
    assert sorted(path.name for path in venv.iterdir()) == before


def test_setup_from_within_the_environment_uses_the_interpreter_beneath(
    sandbox: Sandbox, capfd: pytest.CaptureFixture[str]
) -> None:
    """As the environment is removed before it is made again."""
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, sandbox.folder)
    within = sandbox.folder / ".venv/bin/python3"
    within.parent.mkdir(parents=True)
    within.write_text("#!/bin/sh\necho beneath\n")
    within.chmod(0o755)
    sandbox.stand_in("beneath", '#!/usr/bin/env bash\n[[ $1 == --version ]] && echo "Python 3.9.1"\n')
    assert sandbox.code("setup.sh", PATH=f"{within.parent}:{sandbox.environment['PATH']}") == 2
    assert "error: beneath is Python 3.9.1" in capfd.readouterr().err


def test_every_package_ships() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = [
        ".".join(init.parent.relative_to(ROOT).parts)
        for package in ("sora_train", "data_tools")
        for init in ROOT.glob(f"{package}/**/__init__.py")
    ]
    assert sorted(listed) == sorted([*found, "sora_train.conf", "hydra_plugins"])
