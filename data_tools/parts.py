"""Time or frame ranges of a media file that the rows of a caption table refer to."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Mapping
from typing import Any

from data_tools.columns import RANGES
from data_tools.cut import Part
from sora_train.data.index.captions import is_missing

_CLOCK = re.compile(r"(?:(\d+):)?(\d+):(\d+(?:\.\d+)?)")
_FRAMES = re.compile(r"\s*(\d+)\s*:\s*(\d+)\s*")
Range = tuple[str, list[list[Any]]]  # unit (frames or times), and start and end of each range


def listed(value: Any) -> Any:
    """Parse a list that pandas wrote to a cell as text: `['a dog', 'a cat']`. Other values are returned unchanged."""
    text = value.strip() if isinstance(value, str) else ""
    if not (text.startswith("[") and text.endswith("]")):
        return value
    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return value
    return found if found and all(isinstance(item, (str, int, float, list, tuple)) for item in found) else value


def ranges_of(values: Mapping[str, Any]) -> tuple[Range | None, set[str]]:
    """Find a column of a row whose cell has both ends of a range, or of several ranges.

    Returns:
        The ranges and a set with the column's name; None and an empty set if there is no such column.
    """
    known = {name.strip().lower(): name for name in values}
    for what, names in RANGES.items():
        for name in (known[n] for n in names if n in known):
            if pairs := _pairs(what, values[name]):
                return (what, pairs), {name}
    return None, set()


def parts_of(values: Mapping[str, Any], found: Mapping[str, tuple[str, ...]], ranges: Range | None) -> list[Part]:
    """Read the time or frame ranges of a media file that a table row refers to.

    Args:
        values: The row's cells by column name.
        found: Column names by role (`start`, `end`, `start_frame`, `end_frame`). Columns of seconds take precedence
            over columns of frames, and both over `ranges`.
        ranges: Ranges found in a single column, as `ranges_of` returns them.

    Returns:
        The ranges; empty if the row refers to the whole file.

    Raises:
        ValueError: A cell is not a time or a frame number, or a range is empty or negative.
    """
    given = {what: values.get(found[what][0]) for what in ("start", "end", "start_frame", "end_frame") if what in found}
    for what, start, end in (("times", "start", "end"), ("frames", "start_frame", "end_frame")):
        read = _seconds if what == "times" else _frame
        ends = [read(given.get(start)), read(given.get(end))]
        if ends != [None, None]:
            return [_part(ends, what)]
    if ranges is None:
        return []
    what, pairs = ranges
    read = _seconds if what == "times" else _frame
    return [_part([read(end) for end in pair], what) for pair in pairs]


def _part(ends: list[float | None], what: str) -> Part:
    start, end = 0.0 if ends[0] is None else ends[0], math.inf if ends[1] is None else ends[1]
    if not 0 <= start < end:
        raise ValueError(f"it goes from {start:g} to {end:g} {'frames' if what == 'frames' else 's'}")
    return Part(start, end, what == "frames")


def _pairs(what: str, value: Any) -> list[list[Any]]:
    """Start and end of each range in a cell; empty if it has something else, such as a date."""
    if what == "frames" and isinstance(value, str) and (both := _FRAMES.fullmatch(value)):
        return [list(both.groups())]
    items = listed(value)
    if not isinstance(items, list):
        return []
    pairs = [items] if len(items) == 2 and not any(isinstance(item, (list, tuple)) for item in items) else items
    return [list(pair) for pair in pairs] if all(isinstance(p, (list, tuple)) and len(p) == 2 for p in pairs) else []


def _frame(value: Any) -> float | None:
    """Parse a frame number; None for an empty cell. Frames count from 0, and the end of a range is exclusive."""
    if _is_absent(value):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{str(value)[:40]!r} is no number of a frame") from error
    if isinstance(value, bool) or not number.is_integer():
        raise ValueError(f"{str(value)[:40]!r} is no number of a frame")
    return number


def _seconds(value: Any) -> float | None:
    """Parse a time: seconds or [hours:]minutes:seconds, perhaps with a decimal comma. Returns seconds, or None."""
    if _is_absent(value):
        return None
    text = re.sub(r"(\d),(\d+)$", r"\1.\2", value.strip().removesuffix("s")) if isinstance(value, str) else value
    clock = _CLOCK.fullmatch(text) if isinstance(text, str) else None
    try:
        seconds = (
            sum(float(p or 0) * f for p, f in zip(clock.groups(), (3600, 60, 1), strict=True)) if clock else float(text)
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{str(value)[:40]!r} is no time in seconds") from error
    if not math.isfinite(seconds):
        raise ValueError(f"{str(value)[:40]!r} is no time in seconds")
    return seconds


def _is_absent(value: Any) -> bool:
    return is_missing(value) or (isinstance(value, str) and value.strip().lower() in ("", "nan", "null", "none"))
