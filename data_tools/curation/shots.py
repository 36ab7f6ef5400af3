"""The stage `shots`: the spans of a film that may become clips, from the results of the stage `look`."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.curation.borders import Border, border_of
from data_tools.curation.stage import Item, Stage
from data_tools.curation.transitions import Span, slow_changes, true_cuts

_BLACK = 24  # highest level in a black frame, of 255
_SLACK = 0.98  # share of a black frame's pixels that must be that dark
_READS = ("look", "frames", "fps", "vfr", "height", "width")
_MODULES = tuple(f"data_tools.curation.{name}" for name in ("shots", "transitions", "borders"))


def stage(min_seconds: float, max_seconds: float, trim_s: float, short_side: int) -> Stage:
    """Build the stage.

    Args:
        min_seconds: Least length of a clip.
        max_seconds: Largest length of a clip; longer shots are split.
        trim_s: Seconds removed at the ends of a shot, except at the film's beginning and end.
        short_side: Least short side of a clip without its border, in pixels.
    """
    parameters = {"min": min_seconds, "max": max_seconds, "trim": trim_s, "short_side": short_side}
    return Stage("shots", shots, _READS, _MODULES, parameters)


def shots(item: Item, parameters: Mapping[str, Any], folder: Path) -> Item:
    """Find the spans of frames that may become clips; those to be dropped have a reason."""
    seen = np.load(folder.parent / "look" / item["look"])
    fps, tiny = item["fps"], seen["tiny"]
    cuts = true_cuts(seen["cuts"].tolist(), tiny, fps)
    slow = slow_changes(tiny, cuts, fps)
    found = []
    for first, end in _pieces(cuts, slow, len(tiny)):
        trimmed = _trimmed((first, end), len(tiny), math.ceil(parameters["trim"] * fps))
        for span in _split(_without_black(trimmed, tiny), parameters["max"] * fps):
            about = {"start": span[0], "end": span[1], "reason": "", "detail": "", "border": [0, 0, 0, 0]}
            found.append(about | _judged(span, item, parameters, seen))
    return {"shots": found, "flashes": len(seen["cuts"]) - len(cuts), "slow": [list(span) for span in slow]}


def _pieces(cuts: Sequence[int], slow: Sequence[Span], count: int) -> list[Span]:
    """Pieces between cuts and slow changes."""
    breaks = sorted([(cut, cut) for cut in cuts] + [*slow])
    found, at = [], 0
    for first, end in [*breaks, (count, count)]:
        if first > at:
            found.append((at, first))
        at = max(at, end)
    return found


def _trimmed(span: Span, count: int, trim: int) -> Span:
    """Remove `trim` frames at each end of a span that is a transition, not the beginning or the end of the film."""
    first, end = span
    return (first + trim if first > 0 else 0), (end - trim if end < count else count)


def _without_black(span: Span, tiny_THW: np.ndarray) -> Span:
    """Remove black frames at the ends of a span; it is empty if all are black."""
    first, end = span
    bright = np.flatnonzero([np.quantile(picture, _SLACK) > _BLACK for picture in tiny_THW[first:end]])
    return (first + int(bright[0]), first + int(bright[-1]) + 1) if len(bright) else (first, first)


def _split(span: Span, longest: float) -> list[Span]:
    """Split a span into equal parts of at most `longest` frames."""
    first, end = span
    parts = max(1, math.ceil((end - first) / longest))
    edges = [first + (end - first) * n // parts for n in range(parts + 1)]
    return list(zip(edges, edges[1:], strict=False))


def _judged(span: Span, item: Item, parameters: Mapping[str, Any], seen: Any) -> Item:
    """Judge a span: the reason why it is dropped, or its border, and marks and stamps of its first and last frame."""
    first, end = span
    seconds = (end - first) / item["fps"]
    if first == end:
        return {"reason": "black"}
    if seconds < parameters["min"]:
        return {"reason": "too short", "detail": f"{seconds:.2f} s"}
    if seen["damaged"][first:end].any():
        return {"reason": "damaged", "detail": "the decoder reported damage"}
    border = border_of(_within(seen, span), item["height"], item["width"])
    height, width = item["height"] - border.top - border.bottom, item["width"] - border.left - border.right
    if min(height, width) < parameters["short_side"]:
        return {"reason": "too small", "detail": f"{width}x{height} without its border"}
    if border.is_most:
        return {"reason": "border", "detail": f"{width}x{height} of {item['width']}x{item['height']} is picture"}
    return {"border": _listed(border), "marks": [mark_of(seen["tiny"][first]), mark_of(seen["tiny"][end - 1])],
            "stamps": [int(seen["stamps"][first]), int(seen["stamps"][end - 1])]}  # fmt: skip


def _within(seen: Any, span: Span) -> np.ndarray:
    inside = (seen["at"] >= span[0]) & (seen["at"] < span[1])
    return seen["small"][inside]


def _listed(border: Border) -> list[int]:
    return [border.top, border.bottom, border.left, border.right]


def mark_of(tiny_HW: np.ndarray) -> int:
    """Checksum of a frame's tiny picture, to identify the frame when the film is decoded from another position."""
    return zlib.crc32(np.ascontiguousarray(tiny_HW).tobytes())
