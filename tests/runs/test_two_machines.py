"""Two machines on one: two network namespaces with addresses and host names of their own, a torchrun agent in each.

Started by launch/multinode.sh: one of them dies and comes back; the link between them is cut. Started by
launch/slurm.sbatch through a stand-in for srun: the time limit comes, and a node fails. What is trained is each time
what an undisturbed run trains, bit by bit. And from a bucket, each machine with a cache of its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from sora_train.training.state.checkpoint_format import kinds_of, latest_intact, load_full

ROOT = Path(__file__).parents[2]
STEPS = 24
# As Slurm's srun: starts the command once on every node, hands signals on, ends with the highest code.
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do [[ $1 == *=* ]] || shift; shift; done
for node in $NODES; do
    ip netns exec "$node" unshare --uts bash -c 'hostname "$0" && exec "$@"' "$node" "$@" >>"$LOGS/$node.log" 2>&1 &
    tasks+=($!)
done
trap 'told=1; kill -USR1 "${tasks[@]}"' USR1
code=0
for task in "${tasks[@]}"; do
    while told=; do wait "$task"; status=$?; [[ -n $told ]] || break; done # a signal ends `wait` early
    ((status <= code)) || code=$status
done
exit $code
"""
SCONTROL = """#!/usr/bin/env bash
if [[ $1 == show ]]; then printf '%s\\n' $NODES; else echo "$@" >>"$LOGS/scontrol"; fi
"""
# The same run without disturbance, in a process of its own because it forks.
# A bucket on the first machine: the shards, and the index of the first alone.
BUCKET = """
import sys, threading
from pathlib import Path
import boto3
from moto.server import ThreadedMotoServer
address, folder = sys.argv[1:]
ThreadedMotoServer(ip_address=address, port=5000).start()
client = boto3.client("s3", endpoint_url=f"http://{address}:5000", region_name="us-east-1")
client.create_bucket(Bucket="films")
for name in ("train-0.tar", "train-0.index.parquet", "train-1.tar", "val.tar"):
    client.upload_file(str(Path(folder) / name), "films", name)
print("ready", flush=True)
threading.Event().wait()
"""
CLEAN = """
import sys
from pathlib import Path
from tests.faults.bed import Bed, Job
bed = Bed(Path(sys.argv[1]), steps=int(sys.argv[2]))
print(*bed.overrides("disturbed"), sep="\\n")
sys.exit(Job(bed.config("clean"), 2).wait())
"""


class Machine:
    """A network namespace with one interface, `train0`, and a folder of its own under a path that all share."""

    def __init__(self, name: str, address: str, log: Path) -> None:
        self.name, self.address, self.log = name, address, log
        self.shared, self.own = log.with_name("cache"), log.with_suffix(".cache")
        for folder in (self.shared, self.own):
            folder.mkdir(exist_ok=True)
        self.hosts = Path("/etc/netns") / name / "hosts"  # `ip netns exec` lays it over /etc/hosts
        subprocess.run(["ip", "netns", "add", name], check=True)

    def start(self, arguments: list[str], **settings: str) -> subprocess.Popen[bytes]:
        """Start multinode.sh here."""
        mount = f"mount --bind {self.own} {self.shared}"  # seen in this namespace alone
        named = ["unshare", "--uts", "--mount", "bash", "-c", f'hostname "$0" && {mount} && exec "$@"', self.name]
        command = ["ip", "netns", "exec", self.name, *named, str(ROOT / "launch/multinode.sh"), *arguments]
        environment = os.environ | {"LOCAL_ADDR": self.address, "INTERFACE": "train0", **settings}
        with self.log.open("ab") as out:
            return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT)

    def give_up_sooner(self) -> None:
        """Have TCP give up a connection after some 25 s without an answer, not after a quarter of an hour."""
        subprocess.run(["ip", "netns", "exec", self.name, "sysctl", "-qw", "net.ipv4.tcp_retries2=6"], check=True)

    def link(self, state: str) -> None:
        """Cut the cable (`down`), or plug it in again (`up`)."""
        subprocess.run(["ip", "-n", self.name, "link", "set", "train0", state], check=True)

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


def undisturbed(tmp_path: Path) -> list[str]:
    """Train without disturbance; returns the overrides of the run that is to be disturbed."""
    command = [sys.executable, "-c", CLEAN, str(tmp_path / "bed"), str(STEPS)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [line for line in done.stdout.splitlines() if "=" in line]


def assert_exact(tmp_path: Path) -> None:
    """Every step once, with the samples and the weights of the undisturbed run."""
    disturbed, clean = tmp_path / "bed/disturbed", tmp_path / "bed/clean"
    assert "resumed step-" in (disturbed / "logs/rank-0.log").read_text()
    for rank in range(2):
        lines = ledger(disturbed, rank)
        assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
        assert lines == ledger(clean, rank)
    assert weights(disturbed) == weights(clean)


@pytest.mark.campaign
@pytest.mark.timeout(1200)
def test_a_machine_dies_and_comes_back(machines: list[Machine], tmp_path: Path) -> None:
    arguments = undisturbed(tmp_path)
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
        show(machines)
    assert died_at < STEPS
    assert_exact(tmp_path)


@pytest.mark.campaign
@pytest.mark.timeout(1800)
def test_a_cut_link_ends_both_machines_and_a_restart_resumes(machines: list[Machine], tmp_path: Path) -> None:
    arguments = [*undisturbed(tmp_path), "guard.timeout_s=15", "guard.slow_timeout_s=90"]
    first, second = machines
    run = {"NNODES": "2", "NPROC": "1", "MASTER_ADDR": first.address}
    second.give_up_sooner()
    disturbed = tmp_path / "bed/disturbed"
    try:
        both = [machine.start(arguments, RUN_ID="before", **run) for machine in machines]
        wait_until(lambda: len(ledger(disturbed, 1)) >= 5, 400, "the run didn't get to step 5")
        second.link("down")
        assert [process.wait(timeout=600) for process in both] == [1, 1]
        cut_at = len(ledger(disturbed, 1))
        note = json.loads((disturbed / "exit.json").read_text())
        assert note["code"] == 1 and re.match(r"rank [01] on sora-\d+-[01] made no progress for \d+ s", note["reason"])
        for rank, machine in enumerate(machines):  # each says which rank waited, and in what
            said = (disturbed / f"logs/rank-{rank}.stacks.txt").read_text()
            assert f"rank {rank} on {machine.name} made no progress" in said and "phase" in said.partition("\n")[0]
        second.link("up")
        both = [machine.start(arguments, RUN_ID="after", **run) for machine in machines]
        assert [process.wait(timeout=600) for process in both] == [0, 0]
    finally:
        show(machines)
    assert cut_at < STEPS
    assert_exact(tmp_path)


@pytest.mark.campaign
@pytest.mark.timeout(1200)
def test_two_machines_train_from_a_bucket_with_caches_of_their_own(machines: list[Machine], tmp_path: Path) -> None:
    pytest.importorskip("moto.server", reason="moto is not installed")
    arguments = [a for a in undisturbed(tmp_path) if not a.startswith(("data.sources", "data.validation"))]
    first, second = machines
    arguments += [
        "data.sources.demo.shards=['s3://films/train-*.tar']", "data.validation=['s3://films/val.tar']",
        f"+data.storage.s3.endpoint_url=http://{first.address}:5000", f"data.cache.folder={first.shared}",
        "+data.storage.s3.client_kwargs.region_name=us-east-1",
    ]  # fmt: skip
    keys = {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "hush-hush"}
    run = {"NNODES": "2", "NPROC": "1", "MASTER_ADDR": first.address, "RUN_ID": "bucket", **keys}
    command = ["ip", "netns", "exec", first.name, sys.executable, "-c", BUCKET, first.address, str(tmp_path / "bed")]
    with subprocess.Popen(command, env=os.environ | keys, stdout=subprocess.PIPE, text=True) as bucket:
        try:
            assert "ready\n" in iter(bucket.stdout.readline, "")  # type: ignore[union-attr]
            both = [machine.start(arguments, **run) for machine in machines]
            assert [process.wait(timeout=900) for process in both] == [0, 0]
        finally:
            bucket.kill()
            show(machines)
    disturbed, clean = tmp_path / "bed/disturbed", tmp_path / "bed/clean"
    assert "indexing 2 shard(s) on 2 node(s)" in (disturbed / "logs/rank-0.log").read_text()
    names = [{path.name for path in (machine.own / "index").iterdir()} for machine in machines]
    assert names[0] == names[1] and len(names[0]) == 3 and not list(first.shared.iterdir())
    assert all(ledger(disturbed, rank) == ledger(clean, rank) != [] for rank in range(2))
    assert weights(disturbed) == weights(clean)


@pytest.mark.campaign
@pytest.mark.timeout(1800)
def test_slurm_time_limit_and_failed_node(machines: list[Machine], tmp_path: Path) -> None:
    arguments, disturbed = undisturbed(tmp_path), tmp_path / "bed/disturbed"
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    names = [machine.name for machine in machines]
    slurm = {
        "SLURM_JOB_ID": "42", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": ",".join(names), "NPROC": "1",
        "SLURM_SUBMIT_DIR": str(ROOT), "INTERFACE": "train0", "NODES": " ".join(names), "LOGS": str(tmp_path),
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
    }  # fmt: skip

    def submit(count: int) -> subprocess.Popen[bytes]:
        command = ["bash", str(ROOT / "launch/slurm.sbatch"), *arguments]
        environment = os.environ | slurm | {"SLURM_RESTART_COUNT": str(count)}
        return subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)

    try:
        job = submit(0)
        wait_until(lambda: len(ledger(disturbed, 1)) >= 4, 400, "the job didn't get to step 4")
        job.send_signal(signal.SIGUSR1)  # as five minutes before the time limit
        assert job.wait(timeout=300) == 75
        assert (tmp_path / "scontrol").read_text() == "requeue 42\n"
        stopped_at = len(ledger(disturbed, 1))

        job = submit(1)
        wait_until(lambda: len(ledger(disturbed, 1)) >= stopped_at + 4, 400, "the requeued job didn't go on")
        machines[1].die()  # the node is lost; Slurm then ends the job everywhere, and queues it again by itself
        machines[0].die()
        os.killpg(job.pid, signal.SIGKILL)
        job.wait(timeout=60)
        failed_at = len(ledger(disturbed, 1))

        assert submit(2).wait(timeout=600) == 0
    finally:
        for machine in machines:
            print((tmp_path / f"{machine.name}.log").read_text()[-4000:])
    assert stopped_at < failed_at < STEPS
    assert_exact(tmp_path)


def show(machines: list[Machine]) -> None:
    for machine in machines:
        print(machine.name, machine.log.read_text()[-4000:] if machine.log.exists() else "was not started")


def weights(run_dir: Path) -> dict[str, bytes]:
    """The tensors of the last checkpoint, bit by bit."""
    newest = latest_intact(run_dir / "checkpoints")
    assert newest.name == f"step-{STEPS:08d}"
    kinds = kinds_of(newest)
    return {f"{kind} {name}": t.numpy().tobytes() for kind in kinds for name, t in load_full(newest, kind).items()}
