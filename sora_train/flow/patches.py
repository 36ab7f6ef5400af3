"""Conversion between latents and tokens."""

from __future__ import annotations

from torch import Tensor

from sora_train.core.batch import Grid


def patchify(latents_CTHW: Tensor, patch: int) -> Tensor:
    """Split latents into tokens `x_NP`; N runs over (time, height, width), P over (height, width, channel)."""
    tiles = latents_CTHW.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # C T h p w p
    return tiles.permute(1, 2, 4, 3, 5, 0).flatten(3).flatten(0, 2)


def unpatchify(x_NP: Tensor, grid: Grid, patch: int) -> Tensor:
    """Inverse of `patchify`, for the tokens of one clip."""
    tiles = x_NP.unflatten(0, grid).unflatten(3, (patch, patch, -1))  # T h w p p C
    return tiles.permute(5, 0, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
