"""Records of a run, read back: configuration, curves, samples, events. Needs no torch."""

from __future__ import annotations

import json
from array import array
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from sora_train.config.files import read_json, read_yaml
from sora_train.core.cli import InputError
from sora_train.core.lines import entries

Curve = list[tuple[int, float]]
_STRETCHES = 500  # intervals of a thinned curve; more than a figure has pixels
_EVENTS = 100  # number of first and of last events that are kept


@dataclass(frozen=True)
class Record:
    """Contents of a run folder."""

    name: str
    folder: Path
    config: Mapping[str, Any]  # by dotted key
    curves: Mapping[str, Curve]  # by figure, long ones thinned
    end: Mapping[str, Any]  # exit.json, or empty while the run goes on
    quarantine: Mapping[str, int]  # refused samples by cause

    def last(self, figure: str) -> float | None:
        """Last value of a figure, if there is one."""
        curve = self.curves.get(figure)
        return curve[-1][1] if curve else None


def read(folder: str | Path) -> Record:
    """Read a run folder. Incomplete lines are skipped. Raises InputError if it contains no run."""
    path = Path(folder)
    if not (path / "config.yaml").is_file():
        raise InputError(f"{folder} holds no run (there is no {path / 'config.yaml'}); give run folders")
    tree = read_yaml(path / "config.yaml")
    end = path / "exit.json"
    causes: dict[str, int] = {}
    for line in entries(path / "quarantine.jsonl"):
        causes[str(line.get("cause"))] = causes.get(str(line.get("cause")), 0) + 1
    return Record(
        path.name, path, flat(OmegaConf.to_container(tree)), _curves(path / "metrics.jsonl"),
        read_json(end) if end.is_file() else {}, causes,
    )  # fmt: skip


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten nested dictionaries to one with dotted keys; lists are values."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def differences(records: list[Record]) -> dict[str, list[Any]]:
    """Find the keys in which runs differ, with their values in every run ("" if missing); run_dir excluded."""
    keys = sorted({key for record in records for key in record.config} - {"run_dir"})
    rows = {key: [record.config.get(key, "") for record in records] for key in keys}
    return {key: values for key, values in rows.items() if any(value != values[0] for value in values[1:])}


def samples(folder: Path) -> dict[int, list[tuple[str, Path]]]:
    """Find sample videos and images: caption and file of each, by step."""
    found: dict[int, list[tuple[str, Path]]] = {}
    for about in sorted(folder.glob("samples/step-*/*.json")):
        media = next((m for m in (about.with_suffix(".mp4"), about.with_suffix(".png")) if m.is_file()), None)
        if media is not None:
            prompt = str(json.loads(about.read_text()).get("prompt", about.stem))
            found.setdefault(int(about.parent.name.removeprefix("step-")), []).append((prompt, media))
    return found


def events(folder: Path) -> list[tuple[str, str]]:
    """Extract date and text of notable events from the main rank's log: resumes, skipped steps, warnings, errors.

    If there are very many, the first and the last ones.
    """
    log = folder / "logs" / "rank-0.log"
    if not log.is_file():
        return []
    first: list[tuple[str, str]] = []
    last: deque[tuple[str, str]] = deque(maxlen=_EVENTS)
    count = 0
    with log.open(errors="replace") as lines:
        for line in lines:
            date, _, rest = line.rstrip("\n").partition(",")
            level = rest.split(" ")[1:2]
            text = rest.partition(": ")[2]
            told = ("resumed", "a gradient was not finite", "stopped by", "changed since the checkpoint", ": done")
            if level in (["WARNING"], ["ERROR"]) or any(word in text for word in told):
                count += 1
                (first if len(first) < _EVENTS else last).append((date, text))
    left = count - len(first) - len(last)
    return [*first, *([("", f"{left} more, in logs/rank-0.log")] if left else []), *last]


def _curves(path: Path) -> dict[str, Curve]:
    """Read the curves in metrics.jsonl, thinned for plots."""
    points: dict[str, tuple[array[int], array[float]]] = {}
    for line in entries(path):
        for key, value in line.items():
            if key != "step" and isinstance(value, int | float | str):
                steps, values = points.setdefault(key, (array("q"), array("d")))
                steps.append(int(line["step"]))
                values.append(float(value))  # "nan" and "inf" are strings
    return {name: thinned(np.array(steps), np.array(values)) for name, (steps, values) in points.items()}


def thinned(steps: np.ndarray, values: np.ndarray) -> Curve:
    """Thin a curve to about a thousand points: its ends, and minimum and maximum of each interval."""
    if len(steps) > 2 * _STRETCHES:
        stretch = np.arange(len(steps)) * _STRETCHES // len(steps)
        starts = np.flatnonzero(np.diff(stretch, prepend=-1))
        order = np.lexsort((np.where(np.isfinite(values), values, np.nan), stretch))  # NaN comes last in its stretch
        finite = np.add.reduceat(np.isfinite(values).astype(np.int64), starts)
        ends = (order[starts], order[starts + np.maximum(finite, 1) - 1])
        kept = np.unique(np.concatenate(([0, len(steps) - 1], *ends)))
        steps, values = steps[kept], values[kept]
    return list(zip(steps.tolist(), values.tolist(), strict=True))
