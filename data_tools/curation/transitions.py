"""Transitions in a film, from tiny pictures of its frames: finds false cuts at flashes, and dissolves and fades.

A cut detector takes a flash of light for two cuts, and misses a dissolve. Both are recognised by comparing pictures a
few frames apart. After a flash, the picture before it returns. Half-way through a dissolve, the picture is the average
of both ends.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_FLASH_S = 0.25  # seconds that a flash lasts at most
_FLASH_RISE = 20.0  # levels of 255 by which a flash is at least brighter than the frame before it
_FLASH_SHARE = 0.8  # least share of the picture that is brighter in a flash
_STEP = 8.0  # largest difference between neighbouring frames in a fade, levels of 255
_SAME = 0.35  # frames before and after a flash that differ by less than this share of its rise show the same
_HALF_S = (0.17, 0.25, 0.37, 0.5, 0.75, 1.0)  # half the length of the slow changes that are searched, seconds
_CHANGED = 10.0  # least difference between the ends of a slow change, levels of 255
_BLEND = 0.2  # share of that difference by which its inner frames may differ from the blend of its ends
_STABLE = 0.5  # share of that difference by which the frames before and after may differ from its ends

Span = tuple[int, int]  # first frame, and last frame (exclusive)


def true_cuts(cuts: Sequence[int], tiny_THW: np.ndarray, fps: float) -> list[int]:
    """Remove cuts that are part of a flash, or of a fade, such as colours that appear when a film is faded in."""
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
    """Find spans of dissolves and fades that no cut interrupts; they don't overlap."""
    marked = np.zeros(len(tiny_THW), bool)
    for half in sorted({max(2, round(seconds * fps)) for seconds in _HALF_S}):
        for middle in np.flatnonzero(_blends(tiny_THW, half)) + half:
            if not any(middle - half < cut <= middle + half for cut in cuts):
                marked[middle - half : middle + half] = True
    edges = np.flatnonzero(np.diff(np.concatenate([[0], marked.astype(np.int8), [0]])))
    return [(int(first), int(end)) for first, end in edges.reshape(-1, 2)]


def _blends(tiny_THW: np.ndarray, half: int) -> np.ndarray:
    """Tell for each middle frame, from number `half` on, whether a slow change of 2 * `half` frames surrounds it.

    The pictures must change linearly from end to end, and hardly before and after.
    """
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
    """Mean distance of pictures from the blend of two others, of which the second has weight `share`, `(T,)`."""
    blend = one_THW.astype(np.float32) * (1 - share) + other_THW * np.float32(share)
    return np.abs(picture_THW - blend).mean(axis=(1, 2))
