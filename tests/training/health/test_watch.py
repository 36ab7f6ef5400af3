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


def start(python: str, case: str, folder: Path) -> tuple[int, str]:
    """Exit code, and what it printed after the watch began."""
    folder.mkdir()
    process = subprocess.Popen(
        [python, "-c", SETUP + HANGS[case], str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout and process.stdout.readline().startswith("began ")
    out, _ = process.communicate(timeout=250)
    return process.returncode, out


@pytest.mark.parametrize("case", ["sleeps", "holds the GIL"])
def test_a_process_without_progress_is_ended_and_leaves_its_stacks(python: str, case: str, tmp_path: Path) -> None:
    code, _ = start(python, case, tmp_path / "logs")
    assert code == (1 if case == "sleeps" else -signal.SIGKILL)
    text = (tmp_path / "logs/rank-0.stacks.txt").read_text()
    assert 'File "<string>", line' in text
    if case == "sleeps":
        assert f"rank 0 on {socket.gethostname()} made no progress for" in text and "in step 7, phase 'data'" in text
        assert "in step 7, phase 'data'" in (tmp_path / "logs/told").read_text()


@pytest.mark.parametrize("which", ["process", "session"])
def test_time_in_which_it_was_stopped_does_not_count(python: str, which: str, tmp_path: Path) -> None:
    """As a Slurm suspension or `docker pause` stops everything, or `kill -STOP` a rank alone."""
    (tmp_path / "logs").mkdir()
    work = "watch.phase('data'); time.sleep(0.3); print('on', flush=True); time.sleep(0.6); watch.stop()"
    command = [python, "-c", SETUP + work, str(tmp_path / "logs")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    began, on = process.stdout.readline().split(), process.stdout.readline()
    assert began[0] == "began" and on == "on\n"
    rank = int(began[1])  # which the fork server started
    monitors = subprocess.run(["pgrep", "-P", str(rank)], capture_output=True, text=True).stdout.split()
    assert len(monitors) == 1
    pids = [rank, *(map(int, monitors) if which == "session" else ())]
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for pid in pids:
            os.kill(pid, number)
        if number == signal.SIGSTOP:
            time.sleep(5.0)  # more than two time-outs
    assert process.wait(timeout=250) == 0 and not list((tmp_path / "logs").iterdir())


def test_slow_phases_and_an_ended_watch_are_no_alarm(python: str, tmp_path: Path) -> None:
    code, out = start(python, "fine", tmp_path / "logs")
    assert code == 0 and list((tmp_path / "logs").iterdir()) == []
    figures = json.loads(out.replace("'", '"'))
    assert figures["slowest_rank"] == 0 and figures["slowest_rank_lag"] == pytest.approx(0.0)
