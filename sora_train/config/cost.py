"""Geometry and cost of a configuration, as its method states them."""

from __future__ import annotations

from sora_train.config.registry import METHODS
from sora_train.config.schema import Config
from sora_train.core.cost import TEXT_TOKENS, AdapterCost, Cost, Geometry, Shapes


def geometry(config: Config) -> Geometry:
    """The token grid of a run."""
    return METHODS.get(config.method).geometry(config)


def cost(config: Config) -> Cost:
    """Forward cost of a clip in the network that is trained, without adapters; packs are planned by it."""
    return METHODS.get(config.method).cost(config)


def training_cost(config: Config) -> Cost | AdapterCost:
    """Cost of training, for MFU and forecasts."""
    return METHODS.get(config.method).training_cost(config)


def shapes(config: Config) -> Shapes:
    """Sizes at both ends of the diffusion transformer."""
    text = config.text_encoder
    return Shapes(config.vae.channels * config.model.patch**2, text.width, text.pad_to or TEXT_TOKENS)
