"""Black borders of a shot: rows and columns that are black in all of its pictures, alike at both sides.

A dark scene is no border: what is cut off is black through and through, ends at a sharp edge, and is as broad at the
other side.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

_BLACK = 12  # level of 255 that a border stays below
_BRIGHT = 40  # level that the picture reaches next to it
_SLACK = 0.98  # of a row or column that is black
_EDGE = 3  # rows of the small pictures within which it gets bright
_ALIKE = 3  # rows of the small pictures by which both sides may differ
_LEAST = 0.02  # of a side: thinner ones are left
_MARGIN = 2  # pixels cut off beside what was found, as it was found in small pictures
_MOST = 0.75  # of the picture that a border may take


class Border(NamedTuple):
    """Pixels to be cut off at each side, and whether they are so many that little is left."""

    top: int = 0
    bottom: int = 0
    left: int = 0
    right: int = 0
    is_most: bool = False


def border_of(small_SHW: np.ndarray, height: int, width: int) -> Border:
    """The border of a shot of `height` by `width` pixels by small pictures of it, in even numbers of pixels."""
    if not len(small_SHW):
        return Border()
    brightest = small_SHW.max(axis=0)
    rows = np.quantile(brightest, _SLACK, axis=1)
    inner = brightest[rows > _BLACK] if (rows > _BLACK).any() else brightest
    top, bottom = _ends(rows, height)
    left, right = _ends(np.quantile(inner, _SLACK, axis=0), width)
    left_over = (height - top - bottom) * (width - left - right)
    return Border(top, bottom, left, right, left_over < (1 - _MOST) * height * width)


def _ends(levels: np.ndarray, pixels: int) -> tuple[int, int]:
    """Pixels of the border before and behind the picture, by the levels of its rows, of a side of so many pixels."""
    bright = np.flatnonzero(levels > _BLACK)
    if not len(bright):
        return 0, 0
    first, last = int(bright[0]), int(bright[-1])
    before, behind = first, len(levels) - 1 - last
    sharp = (
        levels[first : first + _EDGE].max() >= _BRIGHT and levels[max(0, last - _EDGE + 1) : last + 1].max() >= _BRIGHT
    )
    if abs(before - behind) > _ALIKE or not sharp or min(before, behind) < _LEAST * len(levels):
        return 0, 0
    return _even(before / len(levels) * pixels + _MARGIN), _even(behind / len(levels) * pixels + _MARGIN)


def _even(value: float) -> int:
    return int(np.ceil(value / 2)) * 2
