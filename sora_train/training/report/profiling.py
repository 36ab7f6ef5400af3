"""Traces of chosen steps by torch's profiler, and snapshots of a GPU's memory; one file per rank.

Traces are opened in Perfetto or chrome://tracing, snapshots at https://pytorch.org/memory_viz.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

log = logging.getLogger(__name__)

_ENTRIES = 100_000  # allocations that are remembered; each takes a few kilobytes of host memory


def record_memory() -> None:
    """From now on remember which line made each allocation on the GPU (about 2 microseconds each, says torch)."""
    if torch.cuda.is_available():
        torch.cuda.memory._record_memory_history(max_entries=_ENTRIES, stacks="python")
    else:
        log.warning("logging.memory_history does nothing here: there is no GPU")


def dump_memory(path: Path) -> str:
    """Write what is on this rank's GPU; returns the path, or "" where that fails too."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.cuda.memory._dump_snapshot(str(path))
    except (OSError, RuntimeError, MemoryError) as error:  # the run already fails, for a better reason
        log.warning("the memory snapshot %s can't be written: %s", path, error)
        return ""
    return str(path)


class StepProfile:
    """Records the steps from the first to the last one chosen (both counted from 1); of none where none are chosen."""

    def __init__(self, run_dir: Path, rank: int, steps: list[int]) -> None:
        self.first, self.last = steps or (0, 0)
        self.path = run_dir / "profile" / f"rank-{rank}-steps-{self.first}-{self.last}.json"
        self._running: profile | None = None
        self._phase: record_function | None = None

    def before(self, step: int) -> None:
        """Call as a step begins."""
        if step != self.first or self._running is not None:  # a rollback may come by a second time
            return
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._running = profile(activities=activities, record_shapes=True, profile_memory=True)
        self._running.start()

    def phase(self, name: str) -> None:
        """Call when a phase of a step begins; it stands in the trace by its name."""
        if self._running is not None:
            self._end_phase()
            self._phase = record_function(name)
            self._phase.__enter__()

    def _end_phase(self) -> None:
        if self._phase is not None:
            self._phase.__exit__(None, None, None)
            self._phase = None

    def after(self, step: int) -> None:
        """Call when a step is done; the last one's end writes the trace."""
        self._end_phase()
        if step >= self.last:
            self.close()

    def close(self) -> None:
        """Write what was recorded, also where the run ends early."""
        if self._running is None:
            return
        self._end_phase()
        self._running.stop()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._running.export_chrome_trace(str(self.path))
        self._running = None
