"""Tokens and floating-point operations of a clip, a pack and a step: shared by packing, MFU and planning.

A multiply-add counts as two operations; the backward pass costs twice the forward. Recomputation under activation
checkpointing is not counted (model FLOPs, as in MFU of Chowdhery et al. 2022, PaLM, appendix B).
"""

from __future__ import annotations

from dataclasses import dataclass

from sora_train.config import Config, Method

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
        known: tuple[int | None, ...] = (None,) * len(lengths) if texts is None else texts
        return 3 * sum(self.forward(n, text) for n, text in zip(lengths, known, strict=True))


def geometry(config: Config) -> Geometry:
    """The token grid of a run; an autoencoder's tokens are its latent positions."""
    patch = 1 if config.method is Method.autoencoder else config.model.patch
    return Geometry(config.vae.temporal_stride, config.vae.spatial_stride, patch)


def patch_features(config: Config) -> int:
    """Numbers in one token's patch."""
    return config.vae.channels * config.model.patch**2


def cost(config: Config) -> Cost:
    """Cost of a clip in the network that is trained."""
    return _autoencoder(config) if config.method is Method.autoencoder else _transformer(config)


def _transformer(config: Config) -> Cost:
    m, text = config.model, config.text_encoder
    self_attention = 4 * m.width**2
    cross_attention = 2 * m.width**2
    mlp = 2 * m.width * m.ffn
    per_block = 2 * (self_attention + cross_attention + mlp)
    ends = 2 * 2 * patch_features(config) * m.width
    pairs = m.depth * 4 * m.width  # scores and weighted values
    per_text = 2 * (text.width * m.width + m.width**2) + m.depth * 2 * 2 * m.width**2
    return Cost(m.depth * per_block + ends, pairs, per_text, pairs, text.pad_to or TEXT_TOKENS)


def _autoencoder(config: Config) -> Cost:
    """Convolutions per latent position, encoder and decoder alike; levels above the last count their finer grid."""
    v = config.vae
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
