"""Geometry and cost of a configuration, asked of its method."""

from __future__ import annotations

from sora_train.config.registry import METHODS
from sora_train.config.schema import Config
from sora_train.core.cost import TEXT_TOKENS, AdapterCost, Cost, Geometry, Shapes


def geometry(config: Config) -> Geometry:
    """Strides and patch side of a run, from which token grids follow."""
    return METHODS.get(config.method).geometry(config)


def cost(config: Config) -> Cost:
    """Forward FLOPs of a clip in the trained network, adapters excluded. Packs are balanced by it."""
    return METHODS.get(config.method).cost(config)


def training_cost(config: Config) -> Cost | AdapterCost:
    """FLOPs of the forward and backward pass, for MFU and forecasts."""
    return METHODS.get(config.method).training_cost(config)


def shapes(config: Config) -> Shapes:
    """Input and output sizes of the diffusion transformer."""
    text = config.text_encoder
    return Shapes(config.vae.channels * config.model.patch**2, text.width, text.pad_to or TEXT_TOKENS)
