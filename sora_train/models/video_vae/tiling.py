"""Application of a function to large videos in bounded memory: by tiles in space and by pieces in time.

A tile is computed with a margin of `overlap` positions that is then cut off. If the margin is at least the function's
receptive radius, the result equals that of the whole video; with a smaller one it is close to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor


def tiled(function: Callable[[Tensor], Tensor], x: Tensor, size: int, overlap: int, scale: float) -> Tensor:
    """Apply a function tile by tile.

    Args:
        function: Scales the last two dimensions, height and width, by `scale`.
        x: Its input.
        size: Side of a tile in positions of `x`; `size * scale` is an integer.
        overlap: Margin around a tile in positions of `x`; `overlap * scale` is an integer.
        scale: Side of the output / side of the input.

    Returns:
        The outputs of all tiles, without their margins, put together.
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
    """Size of the margin before a tile, and start and end of the tile with its margins."""
    first = max(0, start - overlap)
    return start - first, first, min(end, start + size + overlap)


def in_time(x_BCTHW: Tensor, first: int, size: int) -> Iterator[Tensor]:
    """Yield the first `first` frames, then pieces of `size` frames; the last may be shorter."""
    yield x_BCTHW[:, :, :first]
    for start in range(first, x_BCTHW.shape[2], size):
        yield x_BCTHW[:, :, start : start + size]
