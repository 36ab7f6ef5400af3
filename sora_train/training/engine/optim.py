"""The optimizer of a network, its parameter groups and its learning rate schedule."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from sora_train.config.schema import OptimConfig
from sora_train.core.cli import InputError
from sora_train.methods.base import Network
from sora_train.training.engine.muon import MatrixOptimizer

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def optimizer_of(network: Network, config: OptimConfig) -> torch.optim.AdamW:
    """The optimizer that `optim` asks for. Raises InputError for Muon where a network names no matrices for it."""
    assert network.rates is not None
    if config.matrices == "adamw":
        return adamw(network.rates, config)
    if not network.matrices:
        raise InputError("optim.matrices=muon: this method names no matrices of blocks; set optim.matrices=adamw")
    return muon(network.rates, network.matrices, config)


def adamw(parts: Iterable[tuple[nn.Module, float]], config: OptimConfig) -> torch.optim.AdamW:
    """Build AdamW over modules, each with a factor on its learning rate.

    Weight decay applies to the weights of linear layers and convolutions, found by module type and not by name. Every
    parameter group has `base_lr`, which the schedule multiplies.
    """
    groups = _groups(parts, config, set())
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.betas[0], config.betas[1]), eps=config.eps, fused=True)


def muon(parts: Iterable[tuple[nn.Module, float]], blocks: Iterable[nn.Module], config: OptimConfig) -> MatrixOptimizer:
    """Muon for the weights of linear layers inside `blocks`, AdamW as above for the other parameters of `parts`."""
    layers = [layer for block in blocks for layer in block.modules() if isinstance(layer, nn.Linear)]
    matrices = [layer.weight for layer in layers if layer.weight.requires_grad]
    m = config.muon
    groups: list[dict[str, Any]] = [
        {**group, "muon": False, "momentum": 0.0} for group in _groups(parts, config, set(map(id, matrices)))
    ]
    groups.append(
        {"params": matrices, "lr": m.lr, "base_lr": m.lr, "weight_decay": m.weight_decay, "muon": True,
         "momentum": m.momentum}
    )  # fmt: skip
    return MatrixOptimizer(groups, lr=config.lr, betas=(config.betas[0], config.betas[1]), eps=config.eps, fused=True)


def _groups(parts: Iterable[tuple[nn.Module, float]], config: OptimConfig, without: set[int]) -> list[dict[str, Any]]:
    """AdamW's groups: of each part what decays and what doesn't, without the parameters of these ids."""
    groups = []
    for module, scale in parts:
        matrices = {id(layer.weight) for layer in module.modules() if isinstance(layer, _LAYERS)}
        trained = [p for p in module.parameters() if p.requires_grad and id(p) not in without]
        for decay, chosen in (
            (config.weight_decay, [p for p in trained if id(p) in matrices]),
            (0.0, [p for p in trained if id(p) not in matrices]),
        ):
            if chosen:
                lr = config.lr * scale
                groups.append({"params": chosen, "lr": lr, "base_lr": lr, "weight_decay": decay})
    return groups


def lr_factor(step: int, steps: int, config: OptimConfig) -> float:
    """Learning rate factor at step 0 .. steps - 1: linear warm-up, constant, linear decay towards 0 at the end."""
    warmup = min(1.0, (step + 1) / max(1, config.warmup_steps))
    decay = (steps - step) / max(1.0, steps * config.decay_fraction)
    return min(warmup, decay, 1.0)
