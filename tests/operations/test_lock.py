"""One run per folder: refused while another lives, free the moment it doesn't, whoever it was."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from sora_train.core.cli import InputError
from sora_train.operations.lock import RunLock

ROOT = Path(__file__).parents[2]
HOLDER = """
import sys, time
from pathlib import Path
from sora_train.operations.lock import RunLock
RunLock(Path(sys.argv[1]))
print("taken", flush=True)
time.sleep(60)
"""


def test_a_living_holder_is_named_and_a_killed_one_is_no_obstacle(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE)
    try:
        assert holder.stdout and holder.stdout.readline() == b"taken\n"
        for _ in range(20):
            with pytest.raises(InputError, match=f"another run works in .*: process {holder.pid} on "):
                RunLock(tmp_path)
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.communicate()
    for _ in range(20):
        RunLock(tmp_path).release()


def test_two_locks_in_one_process_exclude_each_other(tmp_path: Path) -> None:
    first = RunLock(tmp_path)
    with pytest.raises(InputError, match=str(os.getpid())):
        RunLock(tmp_path)
    first.release()
    RunLock(tmp_path).release()


def write(path: Path, heartbeat: int, released: bool = False) -> None:
    path.write_text(json.dumps({"host": "elsewhere", "pid": 7, "heartbeat": heartbeat, "released": released}))


def test_on_another_host_only_a_beating_heart_counts(tmp_path: Path) -> None:
    """Where flock doesn't reach from machine to machine."""
    write(tmp_path / "lock.json", 3)
    RunLock(tmp_path, beat_s=0.1).release()
    write(tmp_path / "lock.json", 4, released=True)
    RunLock(tmp_path, beat_s=3600.0).release()  # a lock that was let go of isn't watched
    write(tmp_path / "lock.json", 5)
    beats = threading.Timer(0.3, write, (tmp_path / "lock.json", 6))
    beats.start()
    with pytest.raises(InputError, match="process 7 on elsewhere"):
        RunLock(tmp_path, beat_s=60.0)  # ends as soon as a beat comes
    beats.join()
