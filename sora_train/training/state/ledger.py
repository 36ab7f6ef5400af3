"""Record of the data that a run consumed: one line per step and rank, and samples refused, skipped or left out.

Lines are written before their step. When a step is repeated after a resume, the refusals of the first attempt are taken
from here, so that a clip that timed out then is left out again.
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
    """This rank's file in `ledger/`, and the lists of refused, skipped and left-out samples of the run."""

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
        """Record samples that the index refused, as step 0, once per run."""
        if not self.quarantine.exists():
            for r in refused:
                self._note(
                    self.quarantine, {"step": 0, "shard": r.shard, "key": r.key, "cause": r.cause, "detail": r.detail}
                )

    def write_skipped(self, step: int, position: Sequence[int], samples: Sequence[int], loss: float) -> None:
        """Record this rank's samples and share of the loss in a step that was skipped as non-finite."""
        place = {"step": step, "position": list(position), "rank": self.rank}
        self._note(self.skipped, {**place, "loss": str(loss), "samples": list(samples)})

    def write_left_out(self, step: int, back_to: int, reason: str, positions: Sequence[Sequence[int]]) -> None:
        """Record a rollback from `step` to the checkpoint of step `back_to`, and the positions it leaves out."""
        places = [list(position) for position in positions]
        self._note(self.left_out, {"step": step, "back_to": back_to, "reason": reason, "positions": places})

    def forget_rollbacks(self) -> None:
        """Remove the record of rollbacks. Without checkpoints, it belongs to an earlier run in the same folder."""
        self.left_out.unlink(missing_ok=True)

    def rollbacks(self) -> list[list[tuple[int, ...]]]:
        """Positions of the steps that each rollback so far left out."""
        return [[tuple(position) for position in entry["positions"]] for entry in entries(self.left_out)]

    def replayed(self, after_step: int) -> dict[tuple[tuple[int, ...], int], Refusal]:
        """Refusals of all ranks in steps after `after_step`, by (position, sample)."""
        known: dict[tuple[tuple[int, ...], int], Refusal] = {}
        for path in self.folder.glob("rank-*.jsonl"):
            for entry in entries_after(path, after_step):
                known |= {(tuple(entry["position"]), r["sample"]): Refusal(**r) for r in entry["refused"]}
        return known

    def cut(self, after_step: int) -> None:
        """Remove the entries of steps after `after_step`, which will be taken again, from the files of all ranks.

        Entries of skipped steps stay if a rollback left the step out, since it isn't taken again.
        """
        left_out = {position for positions in self.rollbacks() for position in positions}
        for path in (*self.folder.glob("rank-*.jsonl"), self.quarantine):
            cut_after(path, after_step)
        cut_after(self.skipped, after_step, stays=lambda entry: tuple(entry["position"]) in left_out)

    def _note(self, path: Path, entry: dict[str, Any]) -> None:
        """Append an entry. A failure (e.g. a full disk) is logged once and doesn't stop the run."""
        try:
            _append(path, entry)
        except OSError as error:
            if not self._failed:
                _log.error("%s can't be written (%s); training goes on, its record has gaps", path, error)
            self._failed = True


def _append(path: Path, entry: dict[str, Any]) -> None:
    """Append a line in one write, so that lines of several ranks don't mix, and a kill leaves no partial line."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        line = json.dumps(entry).encode() + b"\n"
        if os.write(descriptor, line) < len(line):
            os.write(descriptor, b"\n")  # so that the next entry begins on a line of its own
    finally:
        os.close(descriptor)
