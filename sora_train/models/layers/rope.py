"""Positional encodings: rotary embedding (RoPE) over time, height and width, and features of absolute position.

RoPE is that of Su et al. 2021 (arXiv 2104.09864), in the three-axis form of Wan. It encodes relative positions only, so
a small model is slow to learn where in the frame a token is. The absolute features give this position directly.

Clips longer or larger than those a model was trained on lead to angles outside of the trained range. Two scalings
extend an axis by a factor (new length / trained length). `interpolation` divides positions by it (Chen et al. 2023,
arXiv 2306.15595). `ntk` raises the base: the lowest frequency is divided by the factor and the highest unchanged, so
that adjacent tokens stay as distinguishable as before (bloc97 2023; Peng et al. 2023, YaRN, arXiv 2309.00071, 3.1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from sora_train.core.batch import Grid, send

Factors = tuple[float, float, float]  # scaling factors of time, height, width
UNSCALED: Factors = (1.0, 1.0, 1.0)


def axis_sizes(head_dim: int) -> tuple[int, int, int]:
    """Split the channels of a head among the axes: `(time, height, width)`, which add up to `head_dim`.

    Height and width get the same even number, about a third; time gets the rest.
    """
    space = 2 * (head_dim // 6)
    return head_dim - 2 * space, space, space


def frequencies(
    head_dim: int, theta: float, scaling: str = "none", factors: Factors = UNSCALED
) -> tuple[Tensor, Tensor, Tensor]:
    """Angular frequencies of the channel pairs of each axis (time, height, width), in radians per token, float64.

    Args:
        head_dim: Channels of a head.
        theta: Base of the frequencies.
        scaling: none, interpolation or ntk.
        factors: New / trained length of each axis, for the scaling.
    """
    return tuple(
        _axis_frequencies(size, theta, scaling, factor)
        for size, factor in zip(axis_sizes(head_dim), factors, strict=True)
    )  # type: ignore[return-value]


def _axis_frequencies(size: int, theta: float, scaling: str, factor: float) -> Tensor:
    if scaling == "ntk" and size > 2:  # a single channel pair has the highest frequency, which is unchanged
        theta = theta * factor ** (size / (size - 2))
    plain = theta ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    return plain / factor if scaling == "interpolation" else plain


def rotations(
    grids: Sequence[Grid], head_dim: int, theta: float, device: torch.device, scaling: str = "none",
    factors: Factors = UNSCALED,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Cosines and sines of each token's angles, `(N, head_dim / 2)` fp32. Positions of every clip start at 0."""
    cached = [_grid_angles(grid, head_dim, theta, scaling, factors) for grid in grids]
    angles = torch.cat(cached) if cached else torch.zeros(0, head_dim // 2)
    angles = send(angles, device)
    return angles.cos(), angles.sin()


def line_rotations(lengths: Sequence[int], head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of 1-D positions, e.g. of text tokens, `(L, head_dim / 2)` fp32 each.

    Args:
        lengths: Tokens of each sequence; positions of every sequence start at 0.
        head_dim: Channels of a head.
        theta: Base of the frequencies.
        device: Device of the result.
    """
    places = torch.cat([torch.arange(n) for n in lengths]) if lengths else torch.zeros(0, dtype=torch.long)
    angles = send(places[:, None] * _axis_frequencies(head_dim, theta, "none", 1.0), device).float()
    return angles.cos(), angles.sin()


def rotate(x_NKd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair of adjacent channels of every head by its token's angle.

    Pairs are multiplied as complex numbers, which is ten times as fast on a CPU as separating even and odd channels;
    under torch.compile real arithmetic is used, because complex operations aren't fused.
    """
    pairs = x_NKd.to(torch.promote_types(x_NKd.dtype, cos.dtype)).unflatten(-1, (-1, 2))
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    if torch.compiler.is_compiling():
        even, odd = pairs.unbind(-1)
        turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * torch.complex(cos, sin))
    return turned.flatten(-2).type_as(x_NKd)


_WAVES = 4  # frequencies per axis: 1 to 4 half periods over the length of the clip
PLACE_FEATURES = 3 * _WAVES * 2


def place_features(grids: Sequence[Grid], device: torch.device) -> Tensor:
    """Features of absolute position, `(N, PLACE_FEATURES)` fp32.

    Sines and cosines with 1 to 4 half periods along each axis of the token's clip, scaled to unit variance.
    """
    cached = [_grid_features(grid) for grid in grids]
    return send(torch.cat(cached) if cached else torch.zeros(0, PLACE_FEATURES), device)


@lru_cache(maxsize=4096)
def _grid_features(grid: Grid) -> Tensor:
    axes = [(torch.arange(n) + 0.5) / n for n in grid]
    phases = torch.cartesian_prod(*axes).view(-1, 3, 1) * (torch.arange(1, _WAVES + 1) * math.pi)
    return math.sqrt(2.0) * torch.cat((phases.sin(), phases.cos()), dim=1).flatten(1)  # unit variance


@lru_cache(maxsize=4096)
def _grid_angles(grid: Grid, head_dim: int, theta: float, scaling: str, factors: Factors) -> Tensor:
    """Angles of one clip's tokens, `(N, head_dim / 2)` fp32. Cached per grid, of which a training set has few."""
    places = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) for n in grid)).view(-1, 3)
    axes = [places[:, i : i + 1] * freq for i, freq in enumerate(frequencies(head_dim, theta, scaling, factors))]
    return torch.cat(axes, dim=1).float()
