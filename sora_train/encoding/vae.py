"""The frozen VAE of a run: encodes uint8 pixels to normalised latents, and decodes latents to frames."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sora_train.config.released import unreadable
from sora_train.config.schema import VaeConfig
from sora_train.core.cli import InputError
from sora_train.core.pixels import to_frames, to_unit
from sora_train.models.video_vae.model import build_vae
from sora_train.models.video_vae.tiling import in_time, tiled


def trained_vae(config: VaeConfig) -> Any:
    """Load our own trained VAE, or a released one behind the same interface."""
    if config.class_name is not None:
        from sora_train.models.video_vae.released import ReleasedVae  # diffusers takes seconds to import

        return ReleasedVae(config.path or "")
    path = Path(config.path or "") / "vae.safetensors"
    if not path.is_file():
        raise InputError(f"no VAE weights at {path}; export a VAE run there")
    vae = build_vae(config)
    try:
        vae.load_state_dict(load_file(path))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise unreadable(path, error) from error
    return vae


class FrozenVae:
    """A frozen VAE on a device, with the tiling of `vae.tile` for large videos."""

    def __init__(self, config: VaeConfig, vae: Any, device: torch.device) -> None:
        self.config, self.vae, self.device = config, vae, device
        self.vae.eval().requires_grad_(False)

    @classmethod
    def load(cls, config: VaeConfig, device: torch.device) -> FrozenVae:
        """Load the trained VAE at `vae.path`. Raises InputError if there is none."""
        return cls(config, trained_vae(config).to(device), device)

    @torch.no_grad()
    def encode(self, video_BCTHW: Tensor) -> Tensor:
        """Encode uint8 pixels to normalised latents `(B, C, T, H, W)`: the mean of the posterior.

        Videos larger than `vae.tile` are encoded in temporal pieces and spatial tiles.
        """
        c, t = self.config, self.config.tile
        if not self._large(*video_BCTHW.shape[2:]):
            return self.vae.normalise(self.vae.encode(to_unit(video_BCTHW.to(self.device)))[0])
        frames = max(1, t.frames // c.temporal_stride) * c.temporal_stride

        def means(tile_BCTHW: Tensor) -> Tensor:
            pieces = (to_unit(piece.to(self.device)) for piece in in_time(tile_BCTHW, 1 + frames, frames))
            return torch.cat([mean for mean, _ in self.vae.encode_pieces(pieces)], dim=2)

        size, overlap = (self._latent_pixels(pixels) * c.spatial_stride for pixels in (t.pixels, t.overlap))
        return self.vae.normalise(tiled(means, video_BCTHW, size, overlap, 1 / c.spatial_stride))

    @torch.no_grad()
    def decode(self, latents_CTHW: Tensor) -> np.ndarray:
        """Decode normalised latents of one clip to frames `(T, H, W, 3)` uint8.

        Videos larger than `vae.tile` are decoded in temporal pieces and spatial tiles.
        """
        c, t = self.config, self.config.tile
        latents = self.vae.denormalise(latents_CTHW.to(self.device).unsqueeze(0))
        frames, height, width = latents.shape[2:]
        pixels = (1 + (frames - 1) * c.temporal_stride, height * c.spatial_stride, width * c.spatial_stride)
        if not self._large(*pixels):
            return to_frames(self.vae.decode(latents)[0])
        count = max(1, t.frames // c.temporal_stride)

        def pictures(tile_BCTHW: Tensor) -> Tensor:
            pieces = self.vae.decode_pieces(in_time(tile_BCTHW, count, count))
            return torch.from_numpy(np.concatenate([to_frames(piece[0]) for piece in pieces])).permute(0, 3, 1, 2)

        size, overlap = self._latent_pixels(t.pixels), self._latent_pixels(t.overlap)
        return tiled(pictures, latents, size, overlap, c.spatial_stride).permute(0, 2, 3, 1).contiguous().numpy()

    def _large(self, frames: int, height: int, width: int) -> bool:
        return frames > self.config.tile.frames or max(height, width) > self.config.tile.pixels

    def _latent_pixels(self, pixels: int) -> int:
        return -(-pixels // self.config.spatial_stride)
