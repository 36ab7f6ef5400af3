"""What was consumed: one line per step and rank, written before the step; what was refused, skipped or left out.

A replay of a step takes the refusals of the first attempt from here, so that a time-out then isn't a clip now.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sora_train.core.batch import Refusal
from sora_train.core.lines import cut_after, entries, entries_after

_log = logging.getLogger(__name__)


class Ledger:
    """This rank's file under `ledger/`, and the run's quarantine list."""

    def __init__(self, run_dir: Path, rank: int) -> None:
        self.folder, self.quarantine = run_dir / "ledger", run_dir / "quarantine.jsonl"
        self.skipped, self.left_out = run_dir / "skipped.jsonl", run_dir / "left_out.jsonl"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.rank, self._path, self._failed = rank, self.folder / f"rank-{rank}.jsonl", False

    def write(self, step: int, position: Sequence[int], samples: Sequence[int], refused: Sequence[Refusal]) -> None:
        """Record the samples of a step that is about to be taken."""
        entry = {
            "step": step,
            "position": list(position),
            "samples": list(samples),
            "refused": [asdict(r) for r in refused],
        }
        self._note(self._path, entry)
        for r in refused:
            self._note(
                self.quarantine, {"step": step, "shard": r.shard, "key": r.key, "cause": r.cause, "detail": r.detail}
            )

    def refused_before(self, refused: Sequence[Refusal]) -> None:
        """Record once, as step 0, what was refused before any step: by the index."""
        if not self.quarantine.exists():
            for r in refused:
                self._note(
                    self.quarantine, {"step": 0, "shard": r.shard, "key": r.key, "cause": r.cause, "detail": r.detail}
                )

    def write_skipped(self, step: int, position: Sequence[int], samples: Sequence[int], loss: float) -> None:
        """Record this rank's samples in a step that was not finite, and its share of the loss."""
        place = {"step": step, "position": list(position), "rank": self.rank}
        self._note(self.skipped, {**place, "loss": str(loss), "samples": list(samples)})

    def write_left_out(self, step: int, back_to: int, reason: str, positions: Sequence[Sequence[int]]) -> None:
        """Record a rollback: found after `step`, back to which checkpoint, and which steps of the plan are left out."""
        places = [list(position) for position in positions]
        self._note(self.left_out, {"step": step, "back_to": back_to, "reason": reason, "positions": places})

    def rollbacks(self) -> list[list[tuple[int, ...]]]:
        """The steps of the plan that each rollback so far leaves out."""
        return [[tuple(position) for position in entry["positions"]] for entry in entries(self.left_out)]

    def replayed(self, after_step: int) -> dict[tuple[tuple[int, ...], int], Refusal]:
        """Refusals of steps later than `after_step`, by (position, sample), from the ends of the files of all ranks."""
        known: dict[tuple[tuple[int, ...], int], Refusal] = {}
        for path in self.folder.glob("rank-*.jsonl"):
            for entry in entries_after(path, after_step):
                known |= {(tuple(entry["position"]), r["sample"]): Refusal(**r) for r in entry["refused"]}
        return known

    def cut(self, after_step: int) -> None:
        """Forget later steps (and torn lines) in the files of all ranks; they are about to be taken again.

        The record of a skipped step stays where a rollback left that step out: it isn't taken again.
        """
        left_out = {position for positions in self.rollbacks() for position in positions}
        for path in (*self.folder.glob("rank-*.jsonl"), self.quarantine):
            cut_after(path, after_step)
        cut_after(self.skipped, after_step, stays=lambda entry: tuple(entry["position"]) in left_out)

    def _note(self, path: Path, entry: dict[str, Any]) -> None:
        """Append, unless the disk is full: a record is no reason to stop."""
        try:
            _append(path, entry)
        except OSError as error:
            if not self._failed:
                _log.error("%s can't be written (%s); training goes on, its record has gaps", path, error)
            self._failed = True


def _append(path: Path, entry: dict[str, Any]) -> None:
    """One write to the end: lines of several ranks in one file don't mix, and a killed process leaves it whole."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        line = json.dumps(entry).encode() + b"\n"
        if os.write(descriptor, line) < len(line):
            os.write(descriptor, b"\n")  # so that the torn line doesn't swallow the next one
    finally:
        os.close(descriptor)
