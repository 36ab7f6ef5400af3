"""Compares two evaluations clip by clip, which detects far smaller differences than two separate intervals."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sora_train.core.cli import InputError, nearest
from sora_train.evaluation.intervals import Estimate, paired_difference
from sora_train.evaluation.results import SAMPLES

_SAME = ("split", "seed", "task", "clips", "reference", "prompts")  # what two evaluations must agree in


@dataclass(frozen=True)
class Difference:
    """Difference of a figure, second evaluation minus first, over the clips for which both have it."""

    name: str
    first: float
    second: float
    difference: Estimate
    verdict: str


def print_differences(places: list[str], metrics: str | list[str]) -> int:
    """Print the differences between two evaluations of the same clips; returns the exit code.

    Args:
        places: Run folders or JSON files of the two evaluations.
        metrics: `all`, or names of figures.
    """
    if len(places) != 2:
        raise InputError(f"metrics=... compares two evaluations; {len(places)} were given")
    first, second = map(read_evaluation, places)
    names = [] if metrics == "all" else metrics if isinstance(metrics, list) else [metrics]
    console = Console()
    console.print(differences_table(differences(first, second, names), *places))
    distances = distances_side_by_side(first, second)
    if distances is not None:
        console.print(distances)
    return 0


def read_evaluation(place: str) -> dict[str, Any]:
    """Read an evaluation from a run folder or a JSON file. Raises InputError if there is none."""
    path = Path(place) / "evaluation.json" if Path(place).is_dir() else Path(place)
    if not path.is_file():
        raise InputError(f"{place} has no evaluation; give python -m sora_train.evaluate run_dir={place} first")
    try:
        found = json.loads(path.read_text())
        found["columns"][SAMPLES], found["distances"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no evaluation of this version; evaluate again") from error
    return dict(found)


def check_alike(first: Mapping[str, Any], second: Mapping[str, Any]) -> None:
    """Raise InputError for evaluations on different clips, prompts or seeds."""
    hashed = first.get("clips") is not None  # a hash of the prompt file's content, whose path doesn't matter then
    for key in _SAME:
        if key == "prompts" and hashed:
            continue
        if first.get(key) != second.get(key):
            raise InputError(
                f"the evaluations differ in {key} ({first.get(key)} and {second.get(key)}); evaluate both alike"
            )


def differences(first: Mapping[str, Any], second: Mapping[str, Any], names: Sequence[str]) -> list[Difference]:
    """Compute the differences of some figures, or without names of all that both evaluations have.

    Args:
        first: Content of the first evaluation's JSON file.
        second: Content of the second evaluation's JSON file.
        names: Names of figures.

    Raises:
        InputError: The evaluations have different clips or seeds, or one of them doesn't have a figure.
    """
    check_alike(first, second)
    ours, theirs = ({v["name"]: v["figures"] for v in one["columns"][SAMPLES]} for one in (first, second))
    if set(ours) != set(theirs):
        raise InputError(f"the evaluations are of {len(ours)} and {len(theirs)} clips, not of the same ones")
    known = [n for n in first["figures"] if n in second["figures"]]
    for name in names:
        if name not in known:
            raise InputError(f"metrics={name}: not both evaluations have it; {nearest(name, known)}")
    return [_difference(name, first["figures"][name]["better"], ours, theirs) for name in names or known]


def _difference(name: str, better: str | None, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Difference:
    pairs = [(float(ours[v][name]), float(theirs[v][name])) for v in ours if name in ours[v] and name in theirs[v]]
    finite = [pair for pair in pairs if all(map(math.isfinite, pair))]
    first, second = ([pair[side] for pair in finite] for side in (0, 1))
    found = paired_difference(second, first)
    verdict = "can't tell" if not found.n or found.low <= 0 <= found.high else "differs"
    if verdict == "differs" and better is not None:
        verdict = "better" if (found.value > 0) == (better == "up") else "worse"
    mean = [sum(one) / len(one) if one else math.nan for one in (first, second)]
    return Difference(name, mean[0], mean[1], found, verdict)


def differences_table(found: Sequence[Difference], first: str, second: str) -> Table:
    """Build a table with a line per figure. `first` and `second` are the names of the evaluations."""
    out = Table(title=f"{second} against {first}, clip by clip")
    for head in ("figure", first, second, "difference (95% interval)", "n", "verdict"):
        out.add_column(head, justify="left" if head in ("figure", "verdict") else "right")
    for one in found:
        d = one.difference
        cells = [f"{one.first:.4g}", f"{one.second:.4g}", f"{d.value:+.3g} ({d.low:+.3g} to {d.high:+.3g})", str(d.n)]
        out.add_row(one.name.replace("_", " "), *cells, one.verdict)
    return out


def distances_side_by_side(first: Mapping[str, Any], second: Mapping[str, Any]) -> Table | None:
    """Build a table of the distances that both evaluations have; None if there are none.

    Raises InputError if a distance was computed with different numbers of videos.
    """
    out = Table(title="distance from the real videos, less is better")
    for head in ("distance", "first (95% interval)", "second", "real from real (floor)", "n"):
        out.add_column(head, justify="right")
    for name in [n for n in first["distances"] if n in second["distances"]]:
        one, other = (e["distances"][name].get(SAMPLES) for e in (first, second))
        if one is None or other is None:
            continue
        if one["n"] != other["n"]:
            raise InputError(
                f"{name} of {one['n']} and of {other['n']} videos can't be compared: it depends on their number; "
                "evaluate both with the same count"
            )
        cells = [f"{e['value']:.4g} ({e['low']:.3g} to {e['high']:.3g})" for e in (one, other, one["floor"])]
        out.add_row(name.replace("_", " "), *cells, str(one["n"]))
    return out if out.row_count else None
