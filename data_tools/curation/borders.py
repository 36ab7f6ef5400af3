"""Detects black borders of a shot (letterbox, pillarbox): rows and columns that are black in all of its pictures.

A dark scene must not be taken for a border. A border is therefore black throughout, ends at a sharp edge, and is about
as wide at the opposite side.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

_BLACK = 12  # highest level of a border, of 255
_BRIGHT = 40  # least level that the picture reaches next to a border, of 255
_SLACK = 0.98  # share of a row or column that must be black
_EDGE = 3  # rows or columns of the small pictures within which the picture reaches _BRIGHT
_ALIKE = 3  # rows or columns of the small pictures by which opposite borders may differ
_LEAST = 0.02  # least width of a border that is cut off, as a share of the side
_MARGIN = 2  # pixels that are cut off in addition, since borders are measured in small pictures
_MOST = 0.75  # largest share of the picture that borders may take


class Border(NamedTuple):
    """Pixels to be cut off at each side. `is_most`: borders take more than `_MOST` of the picture."""

    top: int = 0
    bottom: int = 0
    left: int = 0
    right: int = 0
    is_most: bool = False


def border_of(small_SHW: np.ndarray, height: int, width: int) -> Border:
    """Find the border of a shot of `height` x `width` pixels in small gray pictures of it; its widths are even."""
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
    """Widths of the borders at both ends of a side of `pixels`, from its rows' or columns' levels in small pictures."""
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
