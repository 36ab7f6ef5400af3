"""Compares the same evaluation of several runs, by size of the model and time of training."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from sora_train.core.cli import InputError, nearest
from sora_train.core.page import page
from sora_train.evaluation.intervals import Estimate
from sora_train.evaluation.paired import check_alike, read_evaluation
from sora_train.evaluation.results import SAMPLES, cell

_TEMPLATE = """
<p>{{ about }}. Each figure with its 95% interval.</p>
<table><tr>{% for head in header %}<th>{{ head }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for text in row %}<td>{{ text }}</td>{% endfor %}</tr>{% endfor %}
</table>
"""


@dataclass(frozen=True)
class Sized:
    """A run with its evaluation: trained parameters, optimizer steps and seconds (of all ranks together)."""

    name: str
    parameters: int
    steps: int
    seconds: float
    evaluation: Mapping[str, Any]

    def figure(self, name: str) -> str:
        """A figure with its interval as text; a dash if the run doesn't have it."""
        entry = self.evaluation["figures"].get(name, {})
        found = entry.get("columns", {}).get(SAMPLES)
        if found is None:
            return "-"
        value, low, high = (float(found[key]) for key in ("value", "low", "high"))
        return cell(Estimate(value, low, high, found["n"]), entry["summary"])


def read_sized(places: Sequence[str], evaluation: str) -> list[Sized]:
    """Read runs and their evaluations, sorted by model size, then by length of training.

    Args:
        places: Run folders.
        evaluation: `clips`, or the name of the prompt file without its ending.

    Raises:
        InputError: A run has no checkpoint or no such evaluation, or the evaluations are of different prompts or seeds.
    """
    found = [_sized(Path(place), evaluation) for place in places]
    for other in found[1:]:
        check_alike(found[0].evaluation, other.evaluation)
    return sorted(found, key=lambda run: (run.parameters, run.seconds, run.name))


def _sized(run: Path, evaluation: str) -> Sized:
    states = sorted(run.glob("checkpoints/step-*/state.json"))
    if not states:
        raise InputError(f"{run} has no checkpoint; name run folders")
    place = run if evaluation == "clips" else run / "evaluation" / f"{evaluation}.json"
    if evaluation != "clips" and not place.is_file():
        raise InputError(f"there is no {place}; give python -m sora_train.evaluate run_dir={run} prompts=... first")
    read = read_evaluation(str(place))
    step = str(read.get("checkpoint", "")).rpartition("-")[2]
    chosen = next((path for path in states if path.parent.name.endswith(f"-{step}")), None)
    if chosen is None:
        raise InputError(f"{place} is of checkpoint {read.get('checkpoint')}, which is gone; evaluate again")
    state = json.loads(chosen.read_text())
    parameters = sum(math.prod(shape) for shape in state["shapes"].values())
    seconds = float(state["totals"]["productive_s"]) * int(state["ranks"])
    return Sized(run.name, parameters, int(state["step"]), seconds, read)


def rows_of(runs: Sequence[Sized], figures: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table; all figures that any run has for none named. Raises InputError for unknown ones."""
    known = list(dict.fromkeys(name for run in runs for name in run.evaluation["figures"]))
    for name in figures:
        if name not in known:
            raise InputError(f"no run has {name}; {nearest(name, known)}")
    wanted = list(figures) or known
    header = ["run", "parameters", "steps", "seconds of training", *(name.replace("_", " ") for name in wanted)]
    return header, [
        [run.name, f"{run.parameters:,}", f"{run.steps:,}", f"{run.seconds:,.0f}", *map(run.figure, wanted)]
        for run in runs
    ]


def sizes_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Build the table for a terminal, with a column per run and a line per figure, as there are many figures."""
    out = Table()
    for column in zip(header, *rows, strict=True):
        if not out.columns:
            for text in column:
                out.add_column(text, justify="left" if text == header[0] else "right")
            continue
        out.add_row(*column)
    return out


def sizes_page(about: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Render the table as an HTML page."""
    return page("By size of the model", _TEMPLATE, {"about": about, "header": header, "rows": rows})
