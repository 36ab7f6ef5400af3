"""The released Wan VAE, through diffusers from a local folder, behind the interface of our own VAE."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, patchify, unpatchify
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from safetensors import SafetensorError
from torch import Tensor, nn

from sora_train.config.released import first_weights, folder_of, unreadable


class ReleasedVae(nn.Module):
    """`AutoencoderKLWan` with its per-channel latent normalisation. For frozen use; it can't be trained here."""

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        folder = folder_of(path, "vae")
        try:
            self.vae = AutoencoderKLWan.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise unreadable(first_weights(folder), error) from error
        self.latents_mean: Tensor
        self.latents_std: Tensor
        for name in ("latents_mean", "latents_std"):
            values = torch.tensor(getattr(self.vae.config, name)).view(-1, 1, 1, 1)
            self.register_buffer(name, values, persistent=False)

    def encode(self, video_BCTHW: Tensor) -> tuple[Tensor, Tensor]:
        """Encode pixels in [-1, 1]: mean and log-variance of latents, each `(B, C, 1 + (T - 1) / 4, H / s, W / s)`."""
        posterior = self.vae.encode(video_BCTHW.to(self.vae.dtype)).latent_dist
        return posterior.mean, posterior.logvar

    def decode(self, latents_BCTHW: Tensor) -> Tensor:
        """Decode latents to pixels `(B, 3, 1 + (T - 1) * 4, H * s, W * s)` in [-1, 1]."""
        return self.vae.decode(latents_BCTHW.to(self.vae.dtype)).sample

    def encode_pieces(self, pieces: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Encode a video piece by piece; yields the moments of each piece, equal to those of the whole video.

        Pieces have a multiple of 4 frames, the first one more. As in diffusers' own `encode`, each convolution keeps
        the last frames of its input for the next piece.
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
        """Decode latents piece by piece, in pieces of any length; equal to decoding them as a whole."""
        memory, begun, patch = _memory(self.vae.decoder), False, self.vae.config.patch_size
        for piece_BCTHW in pieces:
            frames = []
            for x in self.vae.post_quant_conv(piece_BCTHW.to(self.vae.dtype)).split(1, dim=2):
                frames.append(self.vae.decoder(x, feat_cache=memory, feat_idx=[0], first_chunk=not begun))
                begun = True
            out = torch.cat(frames, dim=2)
            yield (out if patch is None else unpatchify(out, patch)).clamp(-1.0, 1.0)

    def normalise(self, latents_BCTHW: Tensor) -> Tensor:
        """Scale latents to mean 0 and standard deviation 1 per channel, as the transformer expects them."""
        return (latents_BCTHW - self.latents_mean) / self.latents_std

    def denormalise(self, latents_BCTHW: Tensor) -> Tensor:
        """Inverse of `normalise`."""
        return latents_BCTHW * self.latents_std + self.latents_mean


def _memory(part: nn.Module) -> list[Any]:
    """Empty feature cache of diffusers: one entry for each causal convolution of an encoder or decoder."""
    return [None] * sum(isinstance(layer, WanCausalConv3d) for layer in part.modules())
