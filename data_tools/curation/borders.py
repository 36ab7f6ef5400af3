"""Black borders of a shot: rows and columns that are dark in all of its pictures."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

_DARK = 24  # level of 255 that a border stays below
_BRIGHT = 48  # level that the picture reaches somewhere: a dark shot tells nothing of its borders
_SLACK = 0.98  # of a row or column that is dark
_LEAST = 0.02  # of a side: thinner ones are left
_MARGIN = 2  # pixels cut off beside what was found, as it was found in small pictures
_MOST = 0.4  # of the picture that a border may take


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
    if np.quantile(brightest, _SLACK) < _BRIGHT:
        return Border()
    rows = np.quantile(brightest, _SLACK, axis=1) > _DARK
    columns = np.quantile(brightest[rows] if rows.any() else brightest, _SLACK, axis=0) > _DARK
    top, bottom = _ends(rows, height)
    left, right = _ends(columns, width)
    left_over = (height - top - bottom) * (width - left - right)
    return Border(top, bottom, left, right, left_over < (1 - _MOST) * height * width)


def _ends(bright: np.ndarray, pixels: int) -> tuple[int, int]:
    """Pixels before the first bright entry and behind the last, of a side of so many pixels."""
    places = np.flatnonzero(bright)
    if not len(places):
        return 0, 0
    shares = places[0] / len(bright), (len(bright) - 1 - places[-1]) / len(bright)
    before, behind = (_even(share * pixels + _MARGIN) if share >= _LEAST else 0 for share in shares)
    return before, behind


def _even(value: float) -> int:
    return int(np.ceil(value / 2)) * 2
