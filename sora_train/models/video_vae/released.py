"""The released Wan VAE through diffusers, from a local folder, with the calls that our own VAE has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, patchify, unpatchify
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn

from sora_train.config.released import folder_of


class ReleasedVae(nn.Module):
    """`AutoencoderKLWan` with its per-channel latent normalisation. Frozen: nothing here is meant to be trained."""

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.vae = AutoencoderKLWan.from_pretrained(folder_of(path, "vae"), local_files_only=True)
        self.latents_mean: Tensor
        self.latents_std: Tensor
        for name in ("latents_mean", "latents_std"):
            values = torch.tensor(getattr(self.vae.config, name)).view(-1, 1, 1, 1)
            self.register_buffer(name, values, persistent=False)

    def encode(self, video_BCTHW: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the latents of pixels in [-1, 1], each `(B, C, 1 + (T - 1) / 4, H / s, W / s)`."""
        posterior = self.vae.encode(video_BCTHW.to(self.vae.dtype)).latent_dist
        return posterior.mean, posterior.logvar

    def decode(self, latents_BCTHW: Tensor) -> Tensor:
        """Pixels `(B, 3, 1 + (T - 1) * 4, H * s, W * s)` in [-1, 1]."""
        return self.vae.decode(latents_BCTHW.to(self.vae.dtype)).sample

    def encode_pieces(self, pieces: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """`encode` of a video that comes in pieces of whole temporal strides, the first with one frame more.

        The same values as of the whole: as in diffusers' own `encode`, every convolution keeps the last frames it saw.
        """
        memory, begun, patch = _memory(self.vae.encoder), False, self.vae.config.patch_size
        for piece_BCTHW in pieces:
            x = piece_BCTHW.to(self.vae.dtype)
            x = x if patch is None else patchify(x, patch)
            chunks = x.split([1, *[4] * (x.shape[2] // 4)] if not begun else 4, dim=2)
            begun = True
            out = torch.cat([self.vae.encoder(c, feat_cache=memory, feat_idx=[0]) for c in chunks], dim=2)
            posterior = DiagonalGaussianDistribution(self.vae.quant_conv(out))
            yield posterior.mean, posterior.logvar

    def decode_pieces(self, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
        """`decode` of latents that come in pieces of any length; the same values as of the whole."""
        memory, begun, patch = _memory(self.vae.decoder), False, self.vae.config.patch_size
        for piece_BCTHW in pieces:
            frames = []
            for x in self.vae.post_quant_conv(piece_BCTHW.to(self.vae.dtype)).split(1, dim=2):
                frames.append(self.vae.decoder(x, feat_cache=memory, feat_idx=[0], first_chunk=not begun))
                begun = True
            out = torch.cat(frames, dim=2)
            yield (out if patch is None else unpatchify(out, patch)).clamp(-1.0, 1.0)

    def normalise(self, latents_BCTHW: Tensor) -> Tensor:
        """Latents with mean 0 and deviation 1 per channel, as the transformer was trained on."""
        return (latents_BCTHW - self.latents_mean) / self.latents_std

    def denormalise(self, latents_BCTHW: Tensor) -> Tensor:
        """The inverse of `normalise`."""
        return latents_BCTHW * self.latents_std + self.latents_mean


def _memory(part: nn.Module) -> list[Any]:
    """A place for what each causal convolution of an encoder or decoder keeps from one piece to the next."""
    return [None] * sum(isinstance(layer, WanCausalConv3d) for layer in part.modules())
