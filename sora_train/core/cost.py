"""Tokens and FLOPs of a clip and a pack, used by packing, MFU and forecasts.

A multiply-add counts as two FLOPs; the backward pass costs twice the forward pass where all weights are trained.
Recomputation under activation checkpointing is not counted: these are model FLOPs, as in the MFU of Chowdhery et al.
2022 (PaLM, appendix B).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

TEXT_TOKENS = 32  # tokens of a typical caption, assumed for captions that aren't known yet


@dataclass(frozen=True)
class Geometry:
    """Pixels per token: strides of the VAE, and the patch side of the transformer in latent pixels."""

    temporal_stride: int
    spatial_stride: int
    patch: int

    @property
    def multiple(self) -> int:
        """Side of a token in pixels; height and width of every clip are multiples of it."""
        return self.spatial_stride * self.patch

    def grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Tokens in time, height and width of a clip of 1 + k * temporal_stride frames; height, width in pixels."""
        return 1 + (frames - 1) // self.temporal_stride, height // self.multiple, width // self.multiple

    def tokens(self, frames: int, height: int, width: int) -> int:
        """Tokens of a clip."""
        t, h, w = self.grid(frames, height, width)
        return t * h * w


@dataclass(frozen=True)
class Shapes:
    """Input and output sizes of a transformer: values in one patch, width and number of text tokens."""

    patch_features: int
    text_width: int
    text_tokens: int


@dataclass(frozen=True)
class Cost:
    """Coefficients of the forward FLOPs of a clip of N tokens with a caption of L tokens.

    FLOPs = `per_token * N + per_pair * N^2 + per_text * L + per_text_pair * N * L`. Counts every matrix product of
    the network except the timestep embedding's, which runs once per distinct timestep and is negligible.
    """

    per_token: int
    per_pair: int
    per_text: int = 0
    per_text_pair: int = 0
    text_tokens: int = 0  # L to assume if the caption isn't known

    def forward(self, tokens: int, text: int | None = None) -> int:
        """FLOPs of one forward pass over a clip of `tokens` tokens; `text` None assumes `text_tokens`."""
        length = self.text_tokens if text is None else text
        with_text = length * (self.per_text + self.per_text_pair * tokens)
        return tokens * (self.per_token + self.per_pair * tokens) + with_text

    def training(self, lengths: list[int] | tuple[int, ...], texts: tuple[int, ...] | None = None) -> int:
        """FLOPs of forward and backward over a pack: lengths of its clips, and of their captions where known."""
        return 3 * _of_pack(self, lengths, texts)

    def of_clips(self, tokens: Any, pixels: Any) -> Any:
        """Cost of each clip, by which the plan assigns clips to slots: forward FLOPs, those of the caption excluded.

        Arguments and result are integers or arrays. `pixels` is unused.
        """
        return self.per_token * tokens + self.per_pair * tokens**2

    def undivided(self, tokens: Any, pixels: Any) -> Any:
        """Part of each clip's cost that every rank of a shared pack repeats: always 0. Integers or arrays."""
        return 0 * tokens

    def of_pack(self, tokens: Sequence[int], pixels: Sequence[int], slots: int = 1) -> int:
        """Cost of a pack per slot: training FLOPs of its clips, divided by the number of slots that it takes."""
        return self.training(list(tokens)) // slots


@dataclass(frozen=True)
class Seconds:
    """Measured time of a clip in forward and backward pass, in femtoseconds, see `sora_train.calibrate`.

    Time = `per_clip + per_token * N + per_pair * N^2 + per_pixel * V` for N tokens and V pixels of all frames together,
    which the VAE encodes. `per_pack` is added once for every pack.
    """

    per_pack: int
    per_clip: int
    per_token: int
    per_pair: int
    per_pixel: int

    def of_clips(self, tokens: Any, pixels: Any) -> Any:
        """Time of each clip, by which the plan assigns clips to slots. Integers or arrays."""
        return self.per_clip + self.per_token * tokens + self.per_pair * tokens**2 + self.per_pixel * pixels

    def undivided(self, tokens: Any, pixels: Any) -> Any:
        """Part of each clip's time that every rank of a shared pack repeats: that of the VAE. Integers or arrays."""
        return self.per_clip + self.per_pixel * pixels

    def of_pack(self, tokens: Sequence[int], pixels: Sequence[int], slots: int = 1) -> int:
        """Time of a pack per slot; the part that isn't `undivided` is shared by the slots that the pack takes."""
        whole = sum(self.undivided(n, v) for n, v in zip(tokens, pixels, strict=True))
        clips = sum(self.of_clips(n, v) for n, v in zip(tokens, pixels, strict=True))
        return int(self.per_pack + whole + (clips - whole) // slots)


@dataclass(frozen=True)
class AdapterCost:
    """FLOPs of training adapters (LoRA) alone: most gradients of the frozen weights need not be computed."""

    both: Cost  # forward and backward pass together

    def training(self, lengths: list[int] | tuple[int, ...], texts: tuple[int, ...] | None = None) -> int:
        """FLOPs of forward and backward over a pack: lengths of its clips, and of their captions where known."""
        return _of_pack(self.both, lengths, texts)


def _of_pack(cost: Cost, lengths: list[int] | tuple[int, ...], texts: tuple[int, ...] | None) -> int:
    known: tuple[int | None, ...] = (None,) * len(lengths) if texts is None else texts
    return sum(cost.forward(n, text) for n, text in zip(lengths, known, strict=True))
