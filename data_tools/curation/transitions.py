"""Transitions in a film, from tiny pictures of its frames: cuts that are flashes, and slow changes that no cut marks.

A detector of cuts takes a flash of light for two cuts, and passes over a dissolve. Both show in how pictures a few
frames apart compare: after a flash the picture before it is there again; half-way through a dissolve the picture is the
average of both ends.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_FLASH_S = 0.25  # seconds that a flash lasts at most
_FLASH_RISE = 20.0  # levels of 255 by which it is brighter than the frames around it
_FLASH_SHARE = 0.8  # of the picture that is brighter
_STEP = 8.0  # levels of 255 from frame to frame that may be a part of a fade
_SAME = 0.35  # of the change at the cut: frames that differ by less show the same
_HALF_S = (0.17, 0.25, 0.37, 0.5, 0.75, 1.0)  # half the length of a slow change that is looked for, seconds
_CHANGED = 10.0  # levels of 255 by which its ends differ
_BLEND = 0.2  # of that difference: how far its middle may be from the average of the ends
_STABLE = 0.5  # of that difference: how much the frames outside of it may change

Span = tuple[int, int]  # first frame and the one behind the last


def true_cuts(cuts: Sequence[int], tiny_THW: np.ndarray, fps: float) -> list[int]:
    """The cuts that no flash explains, nor the colours that come out of black when a film is faded in."""
    longest = max(1, round(_FLASH_S * fps))
    return [cut for cut in cuts if not _in_fade(cut, tiny_THW) and not _in_flash(cut, tiny_THW, longest)]


def _in_fade(cut: int, tiny_THW: np.ndarray) -> bool:
    """Tell whether a cut is a small step among others like it."""
    around_THW = tiny_THW[max(0, cut - 2) : cut + 2]
    steps = _difference(around_THW[:-1], around_THW[1:])
    at = min(1, cut - 1)
    return bool(steps[at] < _STEP and steps[at] < 2 * np.delete(steps, at).max(initial=0.0))


def _in_flash(cut: int, tiny_THW: np.ndarray, longest: int) -> bool:
    """Tell whether a cut is the beginning or the end of a flash of at most `longest` frames."""
    count = len(tiny_THW)
    for first in range(max(1, cut - longest), min(cut, count - 1) + 1):
        before = tiny_THW[first - 1].astype(np.float32)
        for end in range(max(first + 1, cut), min(first + longest, count - 1) + 1):
            inside = tiny_THW[first:end].astype(np.float32).mean(axis=0)
            rise = inside - before
            if rise.mean() < _FLASH_RISE or (rise > 0).mean() < _FLASH_SHARE:
                continue
            if np.abs(tiny_THW[end].astype(np.float32) - before).mean() < _SAME * np.abs(rise).mean():
                return True
    return False


def slow_changes(tiny_THW: np.ndarray, cuts: Sequence[int], fps: float) -> list[Span]:
    """Spans of dissolves and fades, within what cuts leave whole; they don't overlap."""
    marked = np.zeros(len(tiny_THW), bool)
    for half in sorted({max(2, round(seconds * fps)) for seconds in _HALF_S}):
        for middle in np.flatnonzero(_blends(tiny_THW, half)) + half:
            if not any(middle - half < cut <= middle + half for cut in cuts):
                marked[middle - half : middle + half] = True
    edges = np.flatnonzero(np.diff(np.concatenate([[0], marked.astype(np.int8), [0]])))
    return [(int(first), int(end)) for first, end in edges.reshape(-1, 2)]


def _blends(tiny_THW: np.ndarray, half: int) -> np.ndarray:
    """For each middle from `half` on: pictures go in a straight line from end to end, and rest outside."""
    count = len(tiny_THW)
    if count < 2 * half + 1:
        return np.zeros(0, bool)
    quarter = half // 2
    start, end = tiny_THW[: count - 2 * half], tiny_THW[2 * half :]
    middle = tiny_THW[half : count - half]
    early = tiny_THW[half - quarter : count - half - quarter]
    late = tiny_THW[half + quarter : count - half + quarter]
    change = _difference(start, end)
    share = (half - quarter) / (2 * half)
    straight = (
        (_from_blend(middle, start, end, 0.5) < _BLEND * change)
        & (_from_blend(early, start, end, share) < _BLEND * change)
        & (_from_blend(late, start, end, 1 - share) < _BLEND * change)
    )
    before = tiny_THW[np.maximum(np.arange(count - 2 * half) - half, 0)]
    after = tiny_THW[np.minimum(np.arange(count - 2 * half) + 3 * half, count - 1)]
    rests = (_difference(before, start) < _STABLE * change) & (_difference(after, end) < _STABLE * change)
    return (change > _CHANGED) & straight & rests


def _difference(one_THW: np.ndarray, other_THW: np.ndarray) -> np.ndarray:
    return np.abs(one_THW.astype(np.int16) - other_THW).mean(axis=(1, 2))


def _from_blend(picture_THW: np.ndarray, one_THW: np.ndarray, other_THW: np.ndarray, share: float) -> np.ndarray:
    """Mean distance of pictures from the blend that has `share` of the second."""
    blend = one_THW.astype(np.float32) * (1 - share) + other_THW * np.float32(share)
    return np.abs(picture_THW - blend).mean(axis=(1, 2))
