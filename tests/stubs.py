"""Parts of a run, put together for tests of single parts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sora_train.config.schema import Config, FlowConfig, OptimConfig, Precision
from sora_train.core.cost import Geometry
from sora_train.encoding.encoder import Encoder
from sora_train.flow.objective import FlowObjective
from sora_train.methods.diffusion.learner import DiffusionLearner
from sora_train.training.engine.fragments import Fragment
from sora_train.training.engine.zero import Engine


def diffusion(
    config: FlowConfig, geometry: Geometry, channels: int, encode: Any, tokenize: Any, cache_bytes: int = 0
) -> DiffusionLearner:
    """A learner without a network: tests hand one to its `loss`."""
    encoder = Encoder(encode, tokenize, torch.device("cpu"), cache_bytes)
    return DiffusionLearner(FlowObjective(config, geometry, channels), encoder, {}, lambda live, clip: None)  # type: ignore[arg-type,return-value]


def engine(
    network: nn.Module, optimizer: torch.optim.AdamW, precision: Precision, passes: int, clip: float, options: Any
) -> Engine:
    """A network under ZeRO, named net."""
    config = Config("x", steps=1, precision=precision, optim=OptimConfig(clip=clip), deepspeed=options)
    return Engine("net", network, optimizer, passes, config)


def fragment(name: str, master: Tensor, *moments: Tensor, start: int = 0) -> Fragment:
    """A fragment with Adam's moments, zero where none are given."""
    both = moments or (torch.zeros_like(master), torch.zeros_like(master))
    return Fragment(name, start, master, dict(zip(("exp_avg", "exp_avg_sq"), both, strict=True)))
