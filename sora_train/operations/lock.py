"""Lock of a run folder against a second run, released by the kernel however its holder ends.

`run_dir/lock.json` is locked with flock while the run lives. On shared file systems where flock doesn't work between
machines, a heartbeat in the file shows whether a holder on another host is alive. The heartbeat is a counter that is
observed for a few seconds, so clocks need not agree.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

from sora_train.core.cli import InputError

_BEAT_S = 5.0  # seconds between heartbeats


class RunLock:
    """The lock of a run folder, acquired on creation by the main rank. Raises InputError if another run has it."""

    def __init__(self, run_dir: Path, beat_s: float = _BEAT_S) -> None:
        self.path, self.beat_s = run_dir / "lock.json", beat_s
        run_dir.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        host, pid = socket.gethostname(), os.getpid()
        self._mine: dict[str, Any] = {"host": host, "pid": pid, "heartbeat": 0, "released": False}
        self._end = threading.Event()
        try:
            self._take()
        except BaseException:
            os.close(self._descriptor)
            raise
        self._write()
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Release the lock."""
        self._end.set()
        self._thread.join()
        self._mine["released"] = True
        self._write()
        os.close(self._descriptor)

    def _take(self) -> None:
        holder = self._read()
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._refuse(self._read() or holder)
        elsewhere = holder and holder.get("host") != self._mine["host"] and not holder.get("released")
        if elsewhere and self._moves(holder):
            self._refuse(holder)

    def _moves(self, holder: dict[str, Any]) -> bool:
        """Tell whether the heartbeat of a lock holder on another host is still being renewed."""
        end = time.monotonic() + 3 * self.beat_s
        while time.monotonic() < end:
            time.sleep(min(0.2, self.beat_s))
            now = self._read()
            if now.get("heartbeat") != holder.get("heartbeat") or now.get("pid") != holder.get("pid"):
                return True
        return False

    def _refuse(self, holder: dict[str, Any]) -> None:
        raise InputError(
            f"another run works in {self.path.parent}: process {holder.get('pid', '?')} on {holder.get('host', '?')}; "
            "wait for it, stop it, or choose another run_dir"
        )

    def _read(self) -> dict[str, Any]:
        try:
            return dict(json.loads(os.pread(self._descriptor, 4096, 0)))
        except ValueError:  # new, or being written
            return {}

    def _write(self) -> None:
        text = json.dumps(self._mine).encode()
        os.pwrite(self._descriptor, text.ljust(512) + b"\n", 0)  # fixed length, to overwrite the old text completely

    def _beat(self) -> None:
        while not self._end.wait(self.beat_s):
            self._mine["heartbeat"] += 1
            try:
                self._write()
            except OSError:  # e.g. a full disk; the flock isn't affected
                continue
