"""Loss of autoencoder training: reconstruction error, and KL divergence of the latents from a unit Gaussian.

The reconstruction error is L1 plus squared error (L1 alone neglects small objects), plus a perceptual distance if
`vae.perceptual` is configured. The KL term is that of Kingma and Welling 2013. There is no adversarial loss.
"""

from __future__ import annotations

from itertools import groupby

import torch
from torch import Tensor, nn

from sora_train.config.schema import VaeConfig
from sora_train.core.batch import Pack, send
from sora_train.core.cost import Geometry
from sora_train.core.loss import Loss
from sora_train.core.pixels import to_unit
from sora_train.core.seeds import POSTERIOR, stream
from sora_train.models.video_vae.perceptual import Perceptual


class Reconstruction:
    """Reconstruction loss of a pack; the distance of `perceptual` is weighted by `vae.perceptual.weight`."""

    def __init__(self, config: VaeConfig, geometry: Geometry, perceptual: Perceptual | None = None) -> None:
        self.config, self.geometry, self.perceptual = config, geometry, perceptual

    def weight(self, pack: Pack) -> float:
        """Number of pixels of a pack."""
        return float(sum(frames * height * width for frames, height, width in (c.visit.size for c in pack.clips)))

    def loss(self, network: nn.Module, pack: Pack, device: torch.device) -> Loss:
        """Loss of a pack, summed over pixels.

        For a pack without clips the network runs on a blank frame with zero loss, so that all ranks join collectives.
        """
        side = self.geometry.spatial_stride
        if not pack.clips:
            blank = torch.zeros(1, 3, 1, side, side, device=device)
            (output,) = network([blank], [self._noise([0], (1, side, side), device)])
            nothing = torch.zeros((), device=device)
            terms = dict.fromkeys(("l1", "mse", "kl", *(["perceptual"] if self.perceptual else [])), nothing)
            return Loss(0.0 * sum(part.float().sum() for part in output), terms=terms)
        videos, noises = [], []
        for size, run in groupby(pack.clips, key=lambda clip: clip.visit.size):
            clips = list(run)
            pixels = torch.stack([clip.video_TCHW.to(device, non_blocking=True) for clip in clips])
            videos.append(to_unit(pixels.transpose(1, 2)))
            noises.append(self._noise([clip.visit.seed for clip in clips], size, device))
        loss = Loss(torch.zeros((), device=device))
        for video, (decoded, mean, log_variance) in zip(videos, network(videos, noises), strict=True):
            count = video.numel() / video.shape[1]  # of pixels
            terms = self._terms(video, decoded.float(), mean.float(), log_variance.float())  # per pixel
            loss.sum = loss.sum + sum(terms.values(), loss.sum.new_zeros(())) * count
            for name, term in terms.items():
                loss.terms[name] = loss.terms.get(name, torch.zeros_like(term)) + term.detach() * count
        return loss

    def _terms(self, video: Tensor, decoded: Tensor, mean: Tensor, log_variance: Tensor) -> dict[str, Tensor]:
        """The weighted terms of the loss per pixel, by name."""
        error = decoded - video
        kl = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance)
        terms = {
            "l1": error.abs().mean(),
            "mse": self.config.mse_weight * error.square().mean(),
            "kl": self.config.kl_weight * kl.mean(),
        }
        if self.perceptual is not None:
            pictures = (x.transpose(1, 2).flatten(0, 1) for x in (decoded, video))
            terms["perceptual"] = self.config.perceptual.weight * self.perceptual(*pictures).mean()
        return terms

    def _noise(self, seeds: list[int], size: tuple[int, int, int], device: torch.device) -> Tensor:
        frames, height, width = size
        stride = self.geometry.spatial_stride
        shape = (
            self.config.channels,
            1 + (frames - 1) // self.geometry.temporal_stride,
            height // stride,
            width // stride,
        )
        draws = [torch.randn(shape, generator=torch.Generator().manual_seed(stream(seed, POSTERIOR))) for seed in seeds]
        return send(torch.stack(draws), device)
