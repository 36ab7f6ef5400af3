"""Learner of the diffusion model: encodes a pack, noises it, and trains the network to predict the velocity."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from sora_train.config.cost import geometry
from sora_train.config.schema import Config
from sora_train.core.batch import Clip, LatentPack, Pack
from sora_train.core.loss import Loss
from sora_train.encoding.captions import Tokenize, planned_tokenizer, tokenizer
from sora_train.encoding.encoder import Encoder
from sora_train.encoding.vae import FrozenVae
from sora_train.flow.objective import FlowObjective
from sora_train.generation.sampler import Sampler, request_for
from sora_train.methods.base import Engines, Network, OneNetwork, precision_of
from sora_train.models.video_model import VideoModel, base_shapes, planned_model, starting_model
from sora_train.models.video_vae.model import build_vae


class DiffusionLearner(OneNetwork):
    """Trains the video model; the VAE and a released text encoder are frozen.

    `sample(network, clip)` generates frames `(T, H, W, 3)` uint8 for a clip's caption and size.
    """

    name = "video"

    def __init__(
        self,
        objective: FlowObjective,
        encoder: Encoder,
        networks: dict[str, Network],
        sample: Callable[[Any, Clip], np.ndarray],
    ) -> None:
        self.objective, self.encoder, self.networks, self.sample = objective, encoder, networks, sample

    def weight(self, pack: Pack) -> float:
        """Number of loss-bearing tokens (or clips) of a pack."""
        return self.objective.weight(pack)

    @torch.no_grad()
    def prepare(self, pack: Pack) -> LatentPack:
        """Encode the clips and captions of a pack, and noise each clip with its visit's seed."""
        text = self.encoder.text(pack.clips, [self.objective.is_dropped(clip) for clip in pack.clips])
        noised = self.objective.noised(pack.clips, self.encoder.latents(pack), text, self.encoder.device)
        return replace(noised, ranks=pack.part[1])

    def loss(self, network: Any, pack: Pack) -> Loss:
        """Squared error of the velocity; see `FlowObjective.loss`."""
        latents = self.prepare(pack)
        return self.objective.loss(network(latents), pack, latents)

    def preview(self, engines: Engines, clip: Clip) -> np.ndarray:
        """Generate a clip with this clip's caption and size."""
        return self.sample(engines[self.name], clip)


def start(config: Config, device: torch.device) -> DiffusionLearner:
    """Build the learner of a run."""
    # the VAE first: building it draws from the global generator, and so the order determines the network's weights
    vae = FrozenVae.load(config.vae, device)
    return _learner(config, starting_model(config), vae, tokenizer(config, device), config.vae.cache_mib << 20)


def planned(config: Config) -> DiffusionLearner:
    """Build the learner for a forecast; see `Method.planned`."""
    with precision_of(config):
        network = planned_model(config)
    vae = FrozenVae(config.vae, build_vae(config.vae), next(network.parameters()).device)
    # the forecast assumes that every clip is encoded
    return _learner(config, network, vae, planned_tokenizer(config, vae.device), cache_bytes=0)


def _learner(
    config: Config, network: VideoModel, vae: FrozenVae, tokenize: Tokenize, cache_bytes: int
) -> DiffusionLearner:
    device = vae.device
    rates: list[tuple[nn.Module, float]] = [(network.dit, 1.0)]
    if network.text is not None:
        rates.append((network.text, config.optim.text_lr_scale))
    networks = {
        DiffusionLearner.name: Network(
            network,
            rates,
            matrices=None if config.model.lora.rank else network.matrices(),
            base_shapes=base_shapes(config),
        ),  # fmt: skip
        "vae": Network(vae.vae, None),
    }
    objective = FlowObjective(config.flow, geometry(config), config.vae.channels)
    encoder = Encoder(vae.encode, tokenize, device, cache_bytes)

    def sample(live: Any, clip: Clip) -> np.ndarray:
        request = request_for(config, clip.caption, clip.visit.size, clip.visit.seed >> 1)
        return Sampler(config, live, vae, device).videos([request])[0]

    return DiffusionLearner(objective, encoder, networks, sample)
