"""Tokens and floating-point operations of a clip, a pack and a step: shared by packing, MFU and planning.

A multiply-add counts as two operations; the backward pass costs twice the forward where all weights are trained.
Recomputation under activation checkpointing is not counted (model FLOPs, as in MFU of Chowdhery et al. 2022, PaLM,
appendix B).
"""

from __future__ import annotations

from dataclasses import dataclass

TEXT_TOKENS = 32  # of a typical caption, where the real one isn't known yet


@dataclass(frozen=True)
class Geometry:
    """How pixels become tokens: strides of the VAE and the patch of the transformer on top."""

    temporal_stride: int
    spatial_stride: int
    patch: int

    @property
    def multiple(self) -> int:
        """Height and width of a clip are multiples of this many pixels."""
        return self.spatial_stride * self.patch

    def grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Tokens in time, height and width of a clip of 1 + k * temporal_stride frames."""
        return 1 + (frames - 1) // self.temporal_stride, height // self.multiple, width // self.multiple

    def tokens(self, frames: int, height: int, width: int) -> int:
        """Tokens of a clip."""
        t, h, w = self.grid(frames, height, width)
        return t * h * w


@dataclass(frozen=True)
class Shapes:
    """Sizes at both ends of a transformer: numbers in one token's patch, width and number of text tokens."""

    patch_features: int
    text_width: int
    text_tokens: int


@dataclass(frozen=True)
class Cost:
    """Forward FLOPs of a clip of N tokens with a caption of L, integers.

    `per_token * N + per_pair * N^2 + per_text * L + per_text_pair * N * L`: all matrix products of the network but
    those of the timestep embedding, which runs once per distinct timestep.
    """

    per_token: int
    per_pair: int
    per_text: int = 0
    per_text_pair: int = 0
    text_tokens: int = 0  # L of a caption that isn't known yet

    def forward(self, tokens: int, text: int | None = None) -> int:
        """FLOPs of one forward pass over one clip."""
        length = self.text_tokens if text is None else text
        with_text = length * (self.per_text + self.per_text_pair * tokens)
        return tokens * (self.per_token + self.per_pair * tokens) + with_text

    def training(self, lengths: list[int] | tuple[int, ...], texts: tuple[int, ...] | None = None) -> int:
        """FLOPs of forward and backward over a pack: lengths of its clips, and of their captions where known."""
        return 3 * _of_pack(self, lengths, texts)


@dataclass(frozen=True)
class AdapterCost:
    """FLOPs of training where all but adapters is frozen: most of the backward pass's other half isn't there."""

    both: Cost  # forward and backward together

    def training(self, lengths: list[int] | tuple[int, ...], texts: tuple[int, ...] | None = None) -> int:
        """FLOPs of forward and backward over a pack: lengths of its clips, and of their captions where known."""
        return _of_pack(self.both, lengths, texts)


def _of_pack(cost: Cost, lengths: list[int] | tuple[int, ...], texts: tuple[int, ...] | None) -> int:
    known: tuple[int | None, ...] = (None,) * len(lengths) if texts is None else texts
    return sum(cost.forward(n, text) for n, text in zip(lengths, known, strict=True))
