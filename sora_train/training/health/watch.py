"""The hang watch: a rank that makes no progress ends the run, and every live rank leaves its stacks.

Each rank watches itself with a thread. Where one rank hangs the others soon wait for it in a collective, so all of
them run out of time together, write the stacks of all threads and the phase they are in to `logs/rank-N.stacks.txt`,
end the ranks of their machine that can't end themselves, and exit with 1. The thread itself is watched by a timer
of `faulthandler` that needs no GIL. The phases' times also name the slowest rank in the metrics.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

import torch
import torch.distributed as dist

OWN = ("data", "forward and backward")  # phases that show how fast a rank itself is
_GRACE = 2.0  # seconds that the other ranks of this machine have to write their stacks before they are killed
_log = logging.getLogger(__name__)


class Watch:
    """This rank's watch. Call `start` on all ranks together, `phase` at every change, `stop` at the end.

    tell: called with the reason before the process ends (to leave it in exit.json).
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

    _thread: threading.Thread | None

    def start(self) -> None:
        """Begin to watch; all ranks together."""
        places: list[tuple[str, int]] = [("", 0)] * dist.get_world_size()
        dist.all_gather_object(places, (socket.gethostname(), os.getpid()))
        self._peers = [pid for host, pid in places if host == socket.gethostname() and pid != os.getpid()]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("w")
        self.phase("start", slow=True)
        self._end.clear()
        self._arm()  # now: the thread may never get the GIL
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the watch."""
        if self._thread is None or self._file is None:
            return
        self._end.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        self._file.close()
        self._thread = self._file = None
        if not self.path.stat().st_size:
            self.path.unlink()

    def phase(self, name: str, slow: bool = False) -> None:
        """Say what begins now. It may take the time-out, or the long one where it is slow by nature."""
        now = time.monotonic()
        self._spent[self._phase] = self._spent.get(self._phase, 0.0) + now - self._since
        self._phase, self._since = name, now
        self._limit = self.slow_timeout_s if slow else self.timeout_s

    @property
    def doing(self) -> str:
        """The phase that this rank is in, or was in when it failed."""
        return self._phase

    @contextmanager
    def slow(self, name: str) -> Iterator[None]:
        """Around a phase that is slow by nature."""
        before = self._phase
        self.phase(name, slow=True)
        yield
        self.phase(before)

    def stragglers(self) -> dict[str, float]:
        """The rank that spent the most time on its own work since the last call, and by how much more than the median.

        All ranks together. Ranks that wait for each other inside forward (ZeRO-3) look alike.
        """
        own = sum(self._spent.get(name, 0.0) for name in OWN)
        self._spent.clear()
        times = torch.zeros(dist.get_world_size(), dtype=torch.float64)
        times[dist.get_rank()] = own
        dist.all_reduce(times)
        median = max(float(times.quantile(0.5)), 1e-9)
        return {"slowest_rank": int(times.argmax()), "slowest_rank_lag": float(times.max()) / median - 1.0}

    def _arm(self) -> None:
        """For a main thread that holds the GIL: the watch's thread then doesn't come back to put this off."""
        assert self._file is not None
        faulthandler.dump_traceback_later(self._limit + 2 * self._pause, exit=True, file=self._file)

    def _run(self) -> None:
        while not self._end.wait(self._pause):
            self._arm()
            waited = time.monotonic() - self._since
            if waited > self._limit:
                self._fire(waited)

    def _fire(self, waited: float) -> None:
        assert self._file is not None
        faulthandler.cancel_dump_traceback_later()
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
