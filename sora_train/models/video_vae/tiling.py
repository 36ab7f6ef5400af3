"""A function over videos in bounded memory: in space tile by tile, in time piece by piece.

A tile is computed with `overlap` positions around it that are then cut off. Where these are at least as many as the
function looks sideways, the result is that of the whole; with fewer it is near it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor


def tiled(function: Callable[[Tensor], Tensor], x: Tensor, size: int, overlap: int, scale: float) -> Tensor:
    """`function` of `x`, whose last two dimensions are height and width; it scales them by `scale`.

    `size` and `overlap` are positions of x, and whole positions of the result: size, overlap and the sides times
    scale are integers.
    """
    height, width = x.shape[-2:]
    rows = []
    for top in range(0, height, size):
        row = []
        for left in range(0, width, size):
            (above, y0, y1), (before, x0, x1) = _around(top, size, overlap, height), _around(left, size, overlap, width)
            out = function(x[..., y0:y1, x0:x1])
            high, wide = min(size, height - top), min(size, width - left)
            cut = [round(n * scale) for n in (above, above + high, before, before + wide)]
            row.append(out[..., cut[0] : cut[1], cut[2] : cut[3]])
        rows.append(torch.cat(row, dim=-1))
    return torch.cat(rows, dim=-2)


def _around(start: int, size: int, overlap: int, end: int) -> tuple[int, int, int]:
    """Positions before a tile that go along with it, and where it then begins and ends."""
    first = max(0, start - overlap)
    return start - first, first, min(end, start + size + overlap)


def in_time(x_BCTHW: Tensor, first: int, size: int) -> Iterator[Tensor]:
    """The first frames, then `size` at a time."""
    yield x_BCTHW[:, :, :first]
    for start in range(first, x_BCTHW.shape[2], size):
        yield x_BCTHW[:, :, start : start + size]
