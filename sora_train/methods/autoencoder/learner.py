"""Learner of the video VAE: trains reconstruction."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from sora_train.config.cost import geometry
from sora_train.config.schema import Config
from sora_train.core.batch import Clip, Pack
from sora_train.core.loss import Loss
from sora_train.core.pixels import to_frames, to_unit
from sora_train.encoding.vae import trained_vae
from sora_train.methods.autoencoder.reconstruction import Reconstruction
from sora_train.methods.base import Engines, Network, OneNetwork, precision_of
from sora_train.models.video_vae.model import VideoVAE, build_vae
from sora_train.models.video_vae.perceptual import Perceptual


class AutoencoderLearner(OneNetwork):
    """Trains the video VAE, or its decoder alone. A preview shows the clip beside its reconstruction."""

    name = "vae"

    def __init__(self, config: Config, network: VideoVAE, perceptual: Perceptual | None, device: torch.device) -> None:
        self.device = device
        learning: nn.Module = network
        if config.vae.frozen_encoder:
            network.encoder.requires_grad_(False)
            learning = network.decoder
        self.networks = {self.name: Network(network, [(learning, 1.0)], matrices=[learning])}
        if perceptual is not None:
            self.networks["perceptual"] = Network(perceptual, None)
        self.objective = Reconstruction(config.vae, geometry(config), perceptual)

    def weight(self, pack: Pack) -> float:
        """Number of pixels of a pack."""
        return self.objective.weight(pack)

    def loss(self, network: Any, pack: Pack) -> Loss:
        """Reconstruction loss, summed over pixels."""
        return self.objective.loss(network, pack, self.device)

    def preview(self, engines: Engines, clip: Clip) -> np.ndarray:
        """Frames with the clip on the left and its reconstruction on the right."""
        video = to_unit(clip.video_TCHW.transpose(0, 1).to(self.device))
        output = engines[self.name]([video.unsqueeze(0)], [torch.zeros((), device=self.device)])
        (decoded, _, _), *_ = output
        return np.concatenate((to_frames(video), to_frames(decoded[0])), axis=2)


def start(config: Config, device: torch.device) -> AutoencoderLearner:
    """Build the learner of a run."""
    network = trained_vae(config.vae) if config.vae.frozen_encoder else build_vae(config.vae)
    wanted = config.vae.perceptual
    perceptual = Perceptual().load(wanted.files).to(device) if wanted.weight else None
    return AutoencoderLearner(config, network, perceptual, device)


def planned(config: Config) -> AutoencoderLearner:
    """Build the learner for a forecast; see `Method.planned`."""
    with precision_of(config):
        network = build_vae(config.vae)
    perceptual = Perceptual() if config.vae.perceptual.weight else None
    return AutoencoderLearner(config, network, perceptual, next(network.parameters()).device)
