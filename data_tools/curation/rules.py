"""The rule for which clips are kept: an expression over their scores. It can also be used as a filter of training.

The rule consists of parts joined by `and`. The reason for dropping a clip is the first part that it doesn't meet.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_tools.curation.scores import COLUMNS
from sora_train.core.cli import InputError
from sora_train.data.order.filters import Filter

DEFAULT = "motion >= 0.001 and black <= 0.1 and white <= 0.1 and frozen <= 0.5"


class Rule:
    """A rule over the scores. Raises InputError if it can't be parsed, or names an unknown score."""

    def __init__(self, text: str) -> None:
        self.text = text
        Filter(text, "keep")
        tree = ast.parse(text.strip() or "True", mode="eval").body
        parts = tree.values if isinstance(tree, ast.BoolOp) and isinstance(tree.op, ast.And) else [tree]
        self.parts = [Filter(ast.unparse(part), "keep") for part in parts if text.strip()]
        for part in self.parts:
            part.check({name: np.zeros(1) for name in COLUMNS})

    def reasons(self, clips: Sequence[Mapping[str, Any]]) -> list[str]:
        """For each clip the first part of the rule that it doesn't meet; empty if it meets all."""
        values = {name: _column(clips, name) for part in self.parts for name in part.columns}
        found = np.full(len(clips), "", dtype=object)
        for part in self.parts:
            missed = ~part(values.__getitem__, len(clips)) & (found == "")
            found[missed] = part.text
        return found.tolist()

    def thresholds(self) -> dict[str, list[float]]:
        """The numbers that the rule compares each score with, for the report."""
        found: dict[str, list[float]] = {}
        for node in (node for part in self.parts for node in ast.walk(ast.parse(part.text, mode="eval"))):
            if isinstance(node, ast.Compare):
                sides = [node.left, *node.comparators]
                names = [side.id for side in sides if isinstance(side, ast.Name)]
                constants = [side.value for side in sides if isinstance(side, ast.Constant)]
                numbers = [float(value) for value in constants if isinstance(value, (int, float))]
                for name in names:
                    found.setdefault(name, []).extend(numbers)
        return found


def _column(clips: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    return np.array([np.nan if clip[name] is None else clip[name] for clip in clips], dtype=np.float64)


def check_yield(stage: str, kept: int, of: int, strict: bool) -> str:
    """Warning if a stage keeps under 5% or over 98% of at least 200 items; else empty.

    With `strict` the warning is raised as InputError.
    """
    if of < 200 or 0.05 <= kept / of <= 0.98:
        return ""
    line = f"{stage} keeps {kept} of {of}: {'almost nothing' if kept < of / 2 else 'almost everything'}"
    if strict:
        raise InputError(f"{line}; look at the report, then change keep= or what the stage is told, or leave strict=")
    return line
