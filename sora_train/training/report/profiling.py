"""Profiler traces of chosen steps, and snapshots of GPU memory; one file per rank.

Open traces in Perfetto or chrome://tracing, and snapshots at https://pytorch.org/memory_viz.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

log = logging.getLogger(__name__)

_ENTRIES = 100_000  # recorded allocations; each takes a few kilobytes of host memory


def record_memory() -> None:
    """Record the stack of every GPU allocation from now on. Costs about 2 microseconds each, according to torch."""
    if torch.cuda.is_available():
        torch.cuda.memory._record_memory_history(max_entries=_ENTRIES, stacks="python")
    else:
        log.warning("logging.memory_history does nothing here: there is no GPU")


def dump_memory(path: Path) -> str:
    """Write a snapshot of this rank's GPU memory. Returns the path, or "" if it can't be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.cuda.memory._dump_snapshot(str(path))
    except (OSError, RuntimeError, MemoryError) as error:  # must not replace the error that ended the run
        log.warning("the memory snapshot %s can't be written: %s", path, error)
        return ""
    return str(path)


class StepProfile:
    """Traces steps `steps[0]` to `steps[1]` (counted from 1, both included); nothing for an empty list."""

    def __init__(self, run_dir: Path, rank: int, steps: list[int]) -> None:
        self.first, self.last = steps or (0, 0)
        self.path = run_dir / "profile" / f"rank-{rank}-steps-{self.first}-{self.last}.json"
        self._running: profile | None = None
        self._phase: record_function | None = None

    def before(self, step: int) -> None:
        """Start the trace before the first chosen step."""
        if step != self.first or self._running is not None:  # after a rollback the step is taken a second time
            return
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._running = profile(activities=activities, record_shapes=True, profile_memory=True)
        self._running.start()

    def phase(self, name: str) -> None:
        """Mark the beginning of a named phase in the trace."""
        if self._running is not None:
            self._end_phase()
            self._phase = record_function(name)
            self._phase.__enter__()

    def _end_phase(self) -> None:
        if self._phase is not None:
            self._phase.__exit__(None, None, None)
            self._phase = None

    def after(self, step: int) -> None:
        """End a step; after the last chosen one, write the trace."""
        self._end_phase()
        if step >= self.last:
            self.close()

    def close(self) -> None:
        """Write the trace recorded so far, if any; also if the run ends early."""
        if self._running is None:
            return
        self._end_phase()
        self._running.stop()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._running.export_chrome_trace(str(self.path))
        self._running = None
