"""The released Wan VAE through diffusers, from a local folder, with the calls that our own VAE has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn

from sora_train.released import folder_of


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
        """`encode` of all pieces together: diffusers itself goes through a video four frames at a time."""
        yield self.encode(torch.cat(list(pieces), dim=2))

    def decode_pieces(self, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
        """`decode` of all pieces together, for the same reason."""
        yield self.decode(torch.cat(list(pieces), dim=2))

    def normalise(self, latents_BCTHW: Tensor) -> Tensor:
        """Latents with mean 0 and deviation 1 per channel, as the transformer was trained on."""
        return (latents_BCTHW - self.latents_mean) / self.latents_std

    def denormalise(self, latents_BCTHW: Tensor) -> Tensor:
        """The inverse of `normalise`."""
        return latents_BCTHW * self.latents_std + self.latents_mean
