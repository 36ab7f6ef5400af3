"""What was consumed: one line per step and rank, written before the step, and one line per refused sample.

A replay of a step takes the refusals of the first attempt from here, so that a time-out then isn't a clip now.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sora_train.batch import Refusal


class Ledger:
    """This rank's file under `ledger/`, and the run's quarantine list."""

    def __init__(self, run_dir: Path, rank: int) -> None:
        self.folder, self.quarantine = run_dir / "ledger", run_dir / "quarantine.jsonl"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._path = self.folder / f"rank-{rank}.jsonl"

    def write(self, step: int, position: Sequence[int], samples: Sequence[int], refused: Sequence[Refusal]) -> None:
        """Record the samples of a step that is about to be taken."""
        entry = {
            "step": step,
            "position": list(position),
            "samples": list(samples),
            "refused": [asdict(r) for r in refused],
        }
        _append(self._path, entry)
        for r in refused:
            _append(
                self.quarantine, {"step": step, "shard": r.shard, "key": r.key, "cause": r.cause, "detail": r.detail}
            )

    def refused_before(self, refused: Sequence[Refusal]) -> None:
        """Record once, as step 0, what was refused before any step: by the index."""
        if not self.quarantine.exists():
            for r in refused:
                _append(
                    self.quarantine, {"step": 0, "shard": r.shard, "key": r.key, "cause": r.cause, "detail": r.detail}
                )

    def replayed(self, after_step: int) -> dict[tuple[tuple[int, ...], int], Refusal]:
        """Refusals of steps later than `after_step`, by (position, sample), from the files of all ranks."""
        known: dict[tuple[tuple[int, ...], int], Refusal] = {}
        for path in self.folder.glob("rank-*.jsonl"):
            for entry in _entries(path):
                if entry["step"] > after_step:
                    known |= {(tuple(entry["position"]), r["sample"]): Refusal(**r) for r in entry["refused"]}
        return known

    def cut(self, after_step: int) -> None:
        """Forget later steps (and torn last lines) in the files of all ranks; they are about to be taken again."""
        for path in (*self.folder.glob("rank-*.jsonl"), self.quarantine):
            if path.exists():
                kept = [json.dumps(e) + "\n" for e in _entries(path) if e["step"] <= after_step]
                temporary = path.with_suffix(".tmp")
                temporary.write_text("".join(kept))
                temporary.replace(path)


def _append(path: Path, entry: dict[str, Any]) -> None:
    """One write to the end: lines of several ranks in one file don't mix, and a killed process leaves it whole."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, json.dumps(entry).encode() + b"\n")
    finally:
        os.close(descriptor)


def _entries(path: Path) -> list[dict[str, Any]]:
    entries = []
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n"):  # a line without its end was torn by a full disk or a crash
            entries.append(json.loads(line))
    return entries
