"""The record of a campaign: a line per trial that was made, so that slices of a campaign add up; and its table."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scipy.stats import beta


@dataclass(frozen=True)
class Made:
    """One trial: what was wrong (None: nothing), what else it found out, what it cost; by which code."""

    kind: str
    number: int
    seed: int
    cause: str | None
    facts: dict[str, Any]
    seconds: float
    cpu_s: float
    code: str


class Results:
    """The trials in a file of JSON lines."""

    def __init__(self, path: Path, seed: int) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        every = [Made(**json.loads(line)) for line in lines]
        self.made = {(trial.kind, trial.number): trial for trial in every if trial.seed == seed}

    def add(self, trial: Made) -> None:
        """Keep a trial, on the disk at once."""
        self.made[trial.kind, trial.number] = trial
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, json.dumps(asdict(trial)).encode() + b"\n")
        finally:
            os.close(descriptor)

    def of(self, kind: str, wanted: int) -> list[Made]:
        """The trials of a kind, of those wanted."""
        return [trial for (name, number), trial in sorted(self.made.items()) if name == kind and number < wanted]


def bound(failures: int, count: int) -> float:
    """The failure rate that is exceeded with 5% probability at most (Clopper and Pearson 1934, one-sided)."""
    return 1.0 if failures == count else float(beta.ppf(0.95, failures + 1, count - failures))


def row(title: str, trials: Sequence[Made]) -> tuple[str, ...]:
    """A line of the table."""
    failures = sum(trial.cause is not None for trial in trials)
    seconds, cpu = (sum(getattr(trial, name) for trial in trials) / len(trials) for name in ("seconds", "cpu_s"))
    rate = f"{bound(failures, len(trials)):.2%}"
    return title, f"{len(trials)}", f"{failures}", rate, f"{seconds:.1f} s, {cpu:.1f} s", remarks(trials)


def remarks(trials: Sequence[Made]) -> str:
    """Facts that the trials found out beside their verdicts."""
    facts = [trial.facts for trial in trials]
    values: dict[str, list[Any]] = {}
    for each in facts:
        for name, value in each.items():
            values.setdefault(name, []).append(value)
    said = []
    if kills := sum(values.get("kills", [])):
        said.append(f"{sum(values['torn'])} of {kills} kills in a save")
        said.append(f"at most {max(values['lost_steps'])} steps lost")
    if launched := sum(values.get("torchrun", [])):
        said.append(f"{launched} through torchrun")
    for name, text in (
        ("recovery_s", "kill to first new step"), ("found_s", "found after"), ("gone_s", "gone after"),
        ("served_s", "signal to exit"), ("took_s", "answered after"),
    ):  # fmt: skip
        if name in values:
            ordered = sorted(values[name])
            p95 = ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
            said.append(f"{text}: p95 {p95:.1f} s, at most {ordered[-1]:.1f} s")
    if "loss_off" in values:
        said.append(f"losses at most {max(values['loss_off']):.1e} off")
    return "; ".join(said)
