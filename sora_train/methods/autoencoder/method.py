"""The method `autoencoder`: training of a video VAE."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from sora_train.config.rules import require
from sora_train.config.schema import Config
from sora_train.core.cost import AdapterCost, Cost, Geometry
from sora_train.models.video_vae.cost import cost

if TYPE_CHECKING:
    import torch

    from sora_train.methods.base import Learner


class Autoencoder:
    """Trains the VAE of the section `vae` to reconstruct clips. See `methods.base.Method`."""

    fixed = ("method", "vae")
    options: tuple[str, ...] = ()
    highest_stage = 2  # clips of each size run separately, so the order of layers varies, which ZeRO-3 can't prefetch
    splits_sequence = recomputes = reads_latents = reads_captions = makes_videos = False

    def rules(self, config: Config) -> None:
        """Reject options that an autoencoder doesn't support."""
        stage = config.deepspeed.get("zero_optimization", {}).get("stage")
        require(stage != 3, "an autoencoder runs each size by itself, which ZeRO-3 can't follow; use stage 0, 1 or 2")
        _check_frozen_encoder(config)
        require(config.parallel.sequence == 1, "an autoencoder has no sequence; parallel.sequence=1")
        require(
            config.model.lora.rank == 0, "model.lora is for the video model; method=diffusion, or model.lora.rank=0"
        )

    def geometry(self, config: Config) -> Geometry:
        """Geometry in which a token is a latent position."""
        return Geometry(config.vae.temporal_stride, config.vae.spatial_stride, 1)

    def cost(self, config: Config) -> Cost:
        """Forward cost of encoder and decoder."""
        return cost(config.vae)

    def training_cost(self, config: Config) -> Cost | AdapterCost:
        """FLOPs of forward and backward pass; a frozen encoder, half of the network, has no backward pass."""
        whole = cost(config.vae)
        return AdapterCost(replace(whole, per_token=2 * whole.per_token)) if config.vae.frozen_encoder else whole

    def learner(self, config: Config, device: torch.device) -> Learner:
        """Build the learner of a run."""
        from sora_train.methods.autoencoder.learner import start

        return start(config, device)

    def planned(self, config: Config) -> Learner:
        """Build the learner for a forecast."""
        from sora_train.methods.autoencoder.learner import planned

        return planned(config)


def _check_frozen_encoder(config: Config) -> None:
    vae = config.vae
    if not vae.frozen_encoder:
        return
    require(vae.path is not None, "vae.frozen_encoder trains the decoder of an exported VAE; give its folder: vae.path")
    require(
        vae.class_name is None,
        f"vae.path={vae.path} holds a released VAE, which isn't trained here; give an export of a run of ours",
    )
    require(
        config.init_from is None,
        f"vae.frozen_encoder starts from vae.path, whose latents it keeps; leave out init_from={config.init_from}",
    )


AUTOENCODER = Autoencoder()
