"""Two machines on one: two network namespaces with addresses and host names of their own, a torchrun agent in each,
started by launch/multinode.sh. One of them dies and comes back."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from sora_train.training.checkpoint import KINDS, latest_intact, load_full

ROOT = Path(__file__).parents[2]
STEPS = 24
# The same run without disturbance, in a process of its own because it forks.
CLEAN = """
import sys
from pathlib import Path
from benchmarks.fault_bed import Bed, Job
bed = Bed(Path(sys.argv[1]), steps=int(sys.argv[2]))
print(*bed.overrides("disturbed"), sep="\\n")
sys.exit(Job(bed.config("clean"), 2).wait())
"""


class Machine:
    """A network namespace with one interface, `train0`."""

    def __init__(self, name: str, address: str, log: Path) -> None:
        self.name, self.address, self.log = name, address, log
        self.hosts = Path("/etc/netns") / name / "hosts"  # `ip netns exec` lays it over /etc/hosts
        subprocess.run(["ip", "netns", "add", name], check=True)

    def start(self, arguments: list[str], **settings: str) -> subprocess.Popen[bytes]:
        """Start multinode.sh here."""
        named = ["unshare", "--uts", "bash", "-c", 'hostname "$0" && exec "$@"', self.name]
        command = ["ip", "netns", "exec", self.name, *named, str(ROOT / "launch/multinode.sh"), *arguments]
        environment = os.environ | {"LOCAL_ADDR": self.address, "INTERFACE": "train0", **settings}
        with self.log.open("ab") as out:
            return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT)

    def die(self) -> None:
        """Kill everything that runs here, all at once."""
        pids = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=True)
        for pid in pids.stdout.split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[list[Machine]]:
    """Two machines that reach each other and nothing else."""
    if os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("unshare"):
        pytest.skip("network namespaces need root and iproute2")
    mark = os.getpid()
    pair = [Machine(f"sora-{mark}-{n}", f"10.77.0.{n + 1}", tmp_path / f"machine-{n}.log") for n in range(2)]
    try:
        one, other = (machine.name for machine in pair)
        veth = f"ip link add name train0 netns {one} type veth peer name train0 netns {other}"
        subprocess.run(veth.split(), check=True)
        for machine in pair:
            machine.hosts.parent.mkdir(parents=True)
            machine.hosts.write_text("127.0.0.1 localhost\n" + "".join(f"{m.address} {m.name}\n" for m in pair))
            for line in (f"addr add {machine.address}/24 dev train0", "link set train0 up", "link set lo up"):
                subprocess.run(["ip", "-n", machine.name, *line.split()], check=True)
        yield pair
    finally:
        for machine in pair:
            machine.die()
            subprocess.run(["ip", "netns", "del", machine.name], check=True)
            shutil.rmtree(machine.hosts.parent, ignore_errors=True)


def wait_until(true: Callable[[], bool], seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, what
        time.sleep(0.05)


def ledger(run_dir: Path, rank: int) -> list[dict[str, object]]:
    path = run_dir / f"ledger/rank-{rank}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.campaign
@pytest.mark.timeout(1200)
def test_a_machine_dies_and_comes_back(machines: list[Machine], tmp_path: Path) -> None:
    command = [sys.executable, "-c", CLEAN, str(tmp_path / "bed"), str(STEPS)]
    clean = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    arguments = [line for line in clean.stdout.splitlines() if "=" in line]
    first, second = machines
    run = {"NNODES": "2", "NPROC": "1", "MASTER_ADDR": first.address, "RUN_ID": "two", "MAX_RESTARTS": "3"}
    staying = first.start(arguments, **run)
    dying = second.start(arguments, **run)
    disturbed = tmp_path / "bed/disturbed"
    try:
        wait_until(lambda: len(ledger(disturbed, 1)) >= 5, 400, "the run didn't get to step 5")
        second.die()
        assert dying.wait(timeout=60) != 0
        died_at = len(ledger(disturbed, 1))
        back = second.start(arguments, **run)
        assert staying.wait(timeout=600) == 0 and back.wait(timeout=60) == 0
    finally:
        for machine in machines:
            print(machine.name, machine.log.read_text()[-4000:])
    assert died_at < STEPS
    assert "resumed step-" in (disturbed / "logs/rank-0.log").read_text()
    for rank in range(2):
        lines = ledger(disturbed, rank)
        assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
        assert lines == ledger(tmp_path / "bed/clean", rank)
    assert weights(disturbed) == weights(tmp_path / "bed/clean")


def weights(run_dir: Path) -> dict[str, bytes]:
    """The tensors of the last checkpoint, bit by bit."""
    newest = latest_intact(run_dir / "checkpoints")
    assert newest.name == f"step-{STEPS:08d}"
    return {f"{kind} {name}": t.numpy().tobytes() for kind in KINDS for name, t in load_full(newest, kind).items()}
