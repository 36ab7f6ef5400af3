"""Figures of a set of videos: computed per video, summarised with intervals, printed and written."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from sora_train.core.cli import InputError
from sora_train.evaluation.intervals import Estimate, estimate
from sora_train.evaluation.metric import Distance, Metric, Sample

SAMPLES, REAL, THROUGH_VAE = "samples", "real videos", "real through VAE"
STILL = "made part held still"  # baseline: a given frame repeated in place of the generated part


@dataclass(frozen=True)
class Judged:
    """The figures (by metric and name) and the features (by distance) of one video."""

    name: str
    caption: str
    figures: dict[str, dict[str, float]]
    features: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Judges:
    """The metrics and distances of an evaluation."""

    metrics: Sequence[Metric]
    distances: Sequence[Distance] = ()
    skipped: Sequence[str] = ()  # unavailable metrics of the requested groups, each with the reason

    @property
    def names(self) -> list[str]:
        """Names of all metrics and distances."""
        return [one.name for one in self.metrics] + [one.name for one in self.distances]

    def judge(self, video_THWC: np.ndarray, real_THWC: np.ndarray | None, sample: Sample) -> Judged:
        """Compute all figures of one video, without metrics for which the sample lacks something they need.

        Args:
            video_THWC: Frames of the video, uint8.
            real_THWC: Frames of the real video, uint8. None leaves out the metrics that compare with it, as for real
                videos themselves.
            sample: Further facts of the video.

        Raises:
            InputError: The video can't be compared with the real one.
        """
        figures: dict[str, dict[str, float]] = {}
        for one in self.metrics:
            if any(not sample.has(need) for need in one.needs) or ("real" in one.needs and real_THWC is None):
                continue
            try:
                found = one.figures(video_THWC, real_THWC, sample)
            except ValueError as error:
                raise InputError(f"{sample.name}: {one.name}: {error}") from error
            figures[one.name] = {name: value for name, value in found.items() if not math.isnan(value)}
        features = {
            one.name: one.features(video_THWC, sample).tolist()
            for one in self.distances
            if all(sample.has(need) for need in one.needs)
        }
        return Judged(sample.name, sample.caption, figures, features)


Columns = Mapping[str, Sequence[Judged]]  # sets of videos side by side: SAMPLES, REAL, THROUGH_VAE ...


@dataclass(frozen=True)
class Row:
    """One figure, with its estimate for every column that has it."""

    name: str
    better: str | None
    chance: float | None
    summary: str
    cells: dict[str, Estimate]


def summarise(metrics: Sequence[Metric], columns: Columns) -> list[Row]:
    """Summarise the figures of videos: a row for each figure that any video has, in the order of the metrics."""
    rows = []
    for one in metrics:
        values = {c: [video.figures.get(one.name, {}) for video in videos] for c, videos in columns.items()}
        every = dict.fromkeys(name for videos in values.values() for figures in videos for name in figures)
        for name in [n for n in one.chance if n in every] + [n for n in every if n not in one.chance]:
            cells = {c: estimate([f[name] for f in videos if name in f], one.summary) for c, videos in values.items()}
            known = {column: cell for column, cell in cells.items() if cell.n}
            rows.append(Row(name, one.better, one.chance.get(name), one.summary, known))
    return rows


def table(rows: Sequence[Row], columns: Sequence[str], title: str = "figures with 95% intervals") -> Table:
    """Build a table with a line per figure and a column per set of videos.

    A last column has the figure of chance if any row has one.
    """
    out = Table(title=title)
    out.add_column("figure")
    guessing = any(row.chance is not None for row in rows)
    for column in [*columns, *(["chance"] if guessing else [])]:
        out.add_column(column, justify="right")
    arrows = {"up": " (up)", "down": " (down)", None: ""}
    for row in rows:
        cells = [cell(row.cells[column], row.summary) if column in row.cells else "-" for column in columns]
        chance = [] if not guessing else ["-" if row.chance is None else f"{row.chance:.1%}"]
        out.add_row(row.name.replace("_", " ") + arrows[row.better], *cells, *chance)
    return out


def cell(value: Estimate, summary: str) -> str:
    """An estimate as text: in percent for a rate, else with three significant digits."""
    if not value.n:
        return "-"
    if summary == "rate":
        return f"{value.value:.1%} ({value.low:.0%} to {value.high:.0%}, n={value.n})"
    return f"{value.value:.3g} ({value.low:.3g} to {value.high:.3g}, n={value.n})"


def as_json(rows: Sequence[Row]) -> dict[str, Any]:
    """Convert rows to a map for a JSON file, by figure and column. An infinite figure becomes the text "inf"."""
    return {
        row.name: {
            "better": row.better, "summary": row.summary, **({} if row.chance is None else {"chance": row.chance}),
            "columns": {c: {k: finite(v) for k, v in asdict(cell).items()} for c, cell in row.cells.items()},
        }
        for row in rows
    }  # fmt: skip


def finite(value: float) -> float | str:
    """Return a number that JSON can represent, or the text "inf", "-inf" or "nan"."""
    return value if isinstance(value, int) or math.isfinite(value) else str(value)


def videos_json(judged: Sequence[Judged]) -> list[dict[str, Any]]:
    """Convert the figures of videos to a list for a JSON file: name, caption and figures of each."""
    return [
        {
            "name": video.name, "caption": video.caption,
            "figures": {n: finite(v) for one in video.figures.values() for n, v in one.items()},
        }
        for video in judged
    ]  # fmt: skip


def write_json(path: Path, content: object) -> None:
    """Write a JSON file, atomically."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
