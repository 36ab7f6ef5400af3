"""FLOPs of our video autoencoder."""

from __future__ import annotations

from sora_train.config.schema import VaeConfig
from sora_train.core.cost import Cost


def cost(v: VaeConfig) -> Cost:
    """Forward FLOPs per latent position: all convolutions of encoder and decoder, at all positions of finer levels."""
    flops, positions = 0, 1
    for level in reversed(range(len(v.widths))):
        width = v.widths[level]
        if level < len(v.strides):
            time, space = v.strides[level]
            positions *= time * space**2
            flops += 2 * 27 * width * v.widths[level + 1] * positions
        flops += 2 * v.blocks[level] * 2 * 27 * width**2 * positions
    ends = 27 * (3 * v.patch**2 * v.widths[0] * positions + 2 * v.channels * v.widths[-1])
    return Cost(2 * (flops + ends * 2), 0)
