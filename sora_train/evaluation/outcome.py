"""Outcome of an evaluation: its figures, to be printed and written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from sora_train.evaluation.distances import DistanceFigure, distances_json, distances_table, measure_distances
from sora_train.evaluation.results import Columns, Judges, Row, as_json, summarise, table, videos_json


@dataclass(frozen=True)
class Outcome:
    """Outcome of an evaluation: its videos and their figures."""

    title: str
    about: Mapping[str, Any]  # the subject: run or folder, checkpoint, split, seed ...
    columns: Columns  # the evaluated videos are the first column
    rows: Sequence[Row]
    distances: Mapping[str, Sequence[DistanceFigure]]  # by column
    skipped: Sequence[str] = ()  # metrics of a group that weren't available, and why

    def show(self, console: Console) -> None:
        """Print the figures, and the metrics that were left out."""
        console.print(table(self.rows, list(self.columns), self.title))
        if any(self.distances.values()):
            console.print(distances_table(self.distances))
        for line in self.skipped:
            console.print(f"left out {line}", style="dim", markup=False, highlight=False)

    def as_json(self) -> dict[str, Any]:
        """Return the contents of the JSON file."""
        return {
            **self.about, "videos": max(map(len, self.columns.values())), "figures": as_json(self.rows),
            "distances": distances_json(self.distances), "skipped": list(self.skipped),
            "columns": {name: videos_json(videos) for name, videos in self.columns.items()},
        }  # fmt: skip


def conclude(title: str, about: Mapping[str, Any], judges: Judges, columns: Columns) -> Outcome:
    """Summarise the figures and compute the distances of judged videos."""
    distances = measure_distances(judges.distances, columns)
    return Outcome(title, about, columns, summarise(judges.metrics, columns), distances, judges.skipped)
