"""Hang detection: a rank without progress ends the run, and every live rank writes its stack traces.

Each rank has a thread that watches its progress. If one rank hangs, the others soon wait for it in a collective, so all
reach their time-out together. Each writes the stacks of its threads and its phase to `logs/rank-N.stacks.txt`, kills
the ranks on its machine that can't exit themselves, and exits with 1. If the main thread never releases the GIL, a
monitor process (`monitor.py`) makes the rank write its stacks and kills it. Time in which all ranks were stopped (e.g.
suspended by Slurm) doesn't count. Phase times also identify the slowest rank in the metrics.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

import torch
import torch.distributed as dist

OWN = ("data", "forward and backward")  # phases whose time depends on the rank itself
_LATE = 1.0  # seconds by which the watching thread may wake late; by more, the process was stopped
_MONITOR = Path(__file__).with_name("monitor.py")
_GRACE = 2.0  # seconds for the other ranks of this machine to write their stacks before they are killed
_log = logging.getLogger(__name__)


class Watch:
    """Hang detection of this rank. Call `start` (collective), then `phase` at every change, and `stop` at the end.

    Args:
        logs: Folder for the stacks.
        timeout_s: Seconds that a phase may take.
        slow_timeout_s: Seconds that a phase marked as slow may take.
        tell: Called with the reason before the process exits; it writes exit.json.
    """

    def __init__(self, logs: Path, timeout_s: float, slow_timeout_s: float, tell: Callable[[str], None]) -> None:
        self.path = logs / f"rank-{dist.get_rank()}.stacks.txt"
        self.timeout_s, self.slow_timeout_s, self.tell = timeout_s, slow_timeout_s, tell
        self.step, self._phase, self._limit = 0, "start", slow_timeout_s
        self._since = time.monotonic()
        self._spent: dict[str, float] = {}
        self._peers: list[int] = []
        self._end, self._thread = threading.Event(), None
        self._pause = min(0.5, timeout_s / 4)
        self._file: TextIO | None = None
        self._monitor: subprocess.Popen[bytes] | None = None

    _thread: threading.Thread | None

    def start(self) -> None:
        """Start watching. Collective."""
        places: list[tuple[str, int]] = [("", 0)] * dist.get_world_size()
        dist.all_gather_object(places, (socket.gethostname(), os.getpid()))
        self._peers = [pid for host, pid in places if host == socket.gethostname() and pid != os.getpid()]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("w")
        self.phase("start", slow=True)
        self._end.clear()
        faulthandler.register(signal.SIGUSR2, self._file, all_threads=True)  # for the monitor; needs no GIL
        command = [sys.executable, "-I", "-S", str(_MONITOR), str(os.getpid())]
        self._monitor = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        self._beat()  # here and not only in the thread, which may never get the GIL
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop watching, and remove the stacks file if it is empty."""
        if self._thread is None or self._file is None:
            return
        self._end.set()
        self._thread.join()
        self._dismiss()
        faulthandler.unregister(signal.SIGUSR2)
        self._file.close()
        self._thread = self._file = None
        if not self.path.stat().st_size:
            self.path.unlink()

    def phase(self, name: str, slow: bool = False) -> None:
        """Enter a phase, which restarts the time-out; `slow` selects the long one."""
        now = time.monotonic()
        self._spent[self._phase] = self._spent.get(self._phase, 0.0) + now - self._since
        self._phase, self._since = name, now
        self._limit = self.slow_timeout_s if slow else self.timeout_s

    @property
    def doing(self) -> str:
        """The current phase, or the one in which this rank failed."""
        return self._phase

    @contextmanager
    def slow(self, name: str) -> Iterator[None]:
        """Context of a phase with the long time-out; afterwards the previous phase is entered again."""
        before = self._phase
        self.phase(name, slow=True)
        yield
        self.phase(before)

    def stragglers(self) -> dict[str, float]:
        """Find the rank that spent most time in the phases `OWN` since the last call. Collective.

        Returns:
            `slowest_rank`, and `slowest_rank_lag`: its time / the median - 1. Under ZeRO-3 ranks wait for each other
            in the forward pass, so their times are alike.
        """
        own = sum(self._spent.get(name, 0.0) for name in OWN)
        self._spent.clear()
        times = torch.zeros(dist.get_world_size(), dtype=torch.float64)
        times[dist.get_rank()] = own
        dist.all_reduce(times)
        median = max(float(times.quantile(0.5)), 1e-9)
        return {"slowest_rank": int(times.argmax()), "slowest_rank_lag": float(times.max()) / median - 1.0}

    def _beat(self) -> None:
        """Send a heartbeat to the monitor, which kills this process if the next is overdue, e.g. without the GIL."""
        assert self._monitor is not None and self._monitor.stdin is not None
        with suppress(BrokenPipeError):  # the monitor was killed; this thread continues to watch
            self._monitor.stdin.write(f"{self._limit + 2 * self._pause}\n".encode())
            self._monitor.stdin.flush()

    def _dismiss(self) -> None:
        assert self._monitor is not None and self._monitor.stdin is not None
        with suppress(BrokenPipeError):
            self._monitor.stdin.close()
        self._monitor.wait()

    def _run(self) -> None:
        before = time.monotonic()
        while not self._end.wait(self._pause):
            now = time.monotonic()
            if now - before > self._pause + _LATE:  # this process was stopped, which doesn't count as waiting
                self._since += now - before - self._pause
            before = now
            self._beat()
            waited = now - self._since
            if waited > self._limit:
                self._fire(waited)

    def _fire(self, waited: float) -> None:
        assert self._file is not None
        self._dismiss()
        who = f"rank {dist.get_rank()} on {socket.gethostname()}"
        reason = f"{who} made no progress for {waited:.0f} s in step {self.step + 1}, phase {self._phase!r}"
        self._file.write(f"{reason}; the stacks of all threads:\n")
        self._file.flush()
        faulthandler.dump_traceback(file=self._file)
        os.fsync(self._file.fileno())
        _log.critical("%s; stacks are in %s; the run ends", reason, self.path)
        self.tell(f"{reason}; see logs/rank-*.stacks.txt")
        time.sleep(_GRACE)
        for pid in self._peers:  # a stopped or stuck process would keep the launcher waiting
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        os._exit(1)
