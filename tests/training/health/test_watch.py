"""The hang watch: it ends a process that makes no progress, also one that holds the GIL, and leaves others alone."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SETUP = """
import os, sys, time, ctypes
from pathlib import Path
import torch.distributed as dist
from sora_train.training.health.watch import Watch
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
watch = Watch(Path(sys.argv[1]), 2.0, 6.0, lambda reason: Path(sys.argv[1], "told").write_text(reason))
watch.start()
print("began", os.getpid(), flush=True)
"""
HANGS = {
    "sleeps": "watch.step = 6; watch.phase('data'); time.sleep(3600)",
    "holds the GIL": """
watch.phase('data')
mutex, lock = ctypes.create_string_buffer(64), ctypes.PyDLL(None).pthread_mutex_lock
lock(mutex); lock(mutex)  # for ever: a signal doesn't end it, as it would a sleep
""",
    "fine": """
for _ in range(4): watch.phase('data'); time.sleep(0.6)
with watch.slow('validation'): time.sleep(2.8)
watch.phase('forward and backward'); time.sleep(0.2)
print(watch.stragglers())
watch.stop()
time.sleep(3.5)
""",
}


def begin(python: str, text: str, folder: Path) -> subprocess.Popen[str]:
    """A process that is watched and does what the text says."""
    folder.mkdir()
    process = subprocess.Popen([python, "-c", SETUP + text, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    return process


@pytest.fixture(scope="module")
def watched(python: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, Path]]:
    """Exit code, output after the watch began, and folder of every case; they wait for most of their time, together."""
    folder = tmp_path_factory.mktemp("watched")
    processes = {case: begin(python, text, folder / case.replace(" ", "_")) for case, text in HANGS.items()}
    found = {}
    for case, process in processes.items():
        out, _ = process.communicate(timeout=250)
        first, _, rest = out.partition("\n")
        assert first.startswith("began ")
        found[case] = process.returncode, rest, folder / case.replace(" ", "_")
    return found


def test_a_process_without_progress_is_ended_and_leaves_its_stacks(watched: dict[str, tuple[int, str, Path]]) -> None:
    for case, ended in (("sleeps", 1), ("holds the GIL", -signal.SIGKILL)):
        code, _, logs = watched[case]
        assert code == ended
        text = (logs / "rank-0.stacks.txt").read_text()
        assert 'File "<string>", line' in text
        if case == "sleeps":
            assert f"rank 0 on {socket.gethostname()} made no progress for" in text
            assert "in step 7, phase 'data'" in text and "in step 7, phase 'data'" in (logs / "told").read_text()


def test_slow_phases_and_an_ended_watch_are_no_alarm(watched: dict[str, tuple[int, str, Path]]) -> None:
    code, out, logs = watched["fine"]
    assert code == 0 and list(logs.iterdir()) == []
    figures = json.loads(out.replace("'", '"'))
    assert figures["slowest_rank"] == 0 and figures["slowest_rank_lag"] == pytest.approx(0.0)


def test_time_in_which_it_was_stopped_does_not_count(python: str, tmp_path: Path) -> None:
    """As a Slurm suspension or `docker pause` stops everything, or `kill -STOP` a rank alone."""
    work = "watch.phase('data'); time.sleep(0.3); print('on', flush=True); time.sleep(0.6); watch.stop()"
    processes = {which: begin(python, work, tmp_path / which) for which in ("process", "session")}
    pids = []
    for which, process in processes.items():
        assert process.stdout
        began, on = process.stdout.readline().split(), process.stdout.readline()
        assert began[0] == "began" and on == "on\n"
        rank = int(began[1])  # which the fork server started
        monitors = subprocess.run(["pgrep", "-P", str(rank)], capture_output=True, text=True).stdout.split()
        assert len(monitors) == 1
        stopped = [rank, *(map(int, monitors) if which == "session" else ())]
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        pids += stopped
    time.sleep(5.0)  # more than two time-outs
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    for which, process in processes.items():
        assert process.wait(timeout=250) == 0 and not list((tmp_path / which).iterdir())
