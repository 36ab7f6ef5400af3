"""Traces of chosen steps by torch's profiler, one file per rank, to be opened in Perfetto or chrome://tracing."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


class StepProfile:
    """Records the steps from the first to the last one chosen (both counted from 1); of none where none are chosen."""

    def __init__(self, run_dir: Path, rank: int, steps: list[int]) -> None:
        self.first, self.last = steps or (0, 0)
        self.path = run_dir / "profile" / f"rank-{rank}-steps-{self.first}-{self.last}.json"
        self._running: profile | None = None

    def before(self, step: int) -> None:
        """Call as a step begins."""
        if step != self.first or self._running is not None:  # a rollback may come by a second time
            return
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._running = profile(activities=activities, record_shapes=True, profile_memory=True)
        self._running.start()

    def after(self, step: int) -> None:
        """Call when a step is done; the last one's end writes the trace."""
        if step >= self.last:
            self.close()

    def close(self) -> None:
        """Write what was recorded, also where the run ends early."""
        if self._running is None:
            return
        self._running.stop()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._running.export_chrome_trace(str(self.path))
        self._running = None
