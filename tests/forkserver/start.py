"""One server for a session of tests, whichever of its processes asks first."""

from __future__ import annotations

import fcntl
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]


def client_of(folder: Path, owner: int) -> Path:
    """The executable that stands for `python` (see server.py), of a server that ends with the process `owner`."""
    folder.mkdir(exist_ok=True)
    client = folder / "python"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not client.exists():
            _start(folder, owner)
    return client


def _start(folder: Path, owner: int) -> None:
    """Start the server, and wait until it answers."""
    program = str(Path(__file__).with_name("server.py"))
    log = folder / "log"
    mode = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    pid = os.posix_spawn(
        sys.executable, [sys.executable, program, str(folder), str(owner)], os.environ | {"OMP_NUM_THREADS": "1"},
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0), (os.POSIX_SPAWN_OPEN, 1, str(log), mode, 0o644),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ], setsid=True,
    )  # fmt: skip
    while not (folder / "python").exists():
        if os.waitpid(pid, os.WNOHANG)[0]:
            raise RuntimeError(f"the fork server ended:\n{log.read_text()[-4000:]}")
        time.sleep(0.05)
