"""The optimizer of a network, its parameter groups and its learning rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from sora_train.config.schema import OptimConfig
from sora_train.core.cli import InputError
from sora_train.methods.base import Network
from sora_train.training.engine.muon import MatrixOptimizer

_NONE: Mapping[int, float] = {}
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def optimizer_of(network: Network, config: OptimConfig) -> torch.optim.AdamW:
    """Build the optimizer of a network: AdamW, or Muon if `optim.matrices` is muon and the network isn't adapters.

    Raises InputError for Muon if the network's `matrices` are empty.
    """
    assert network.rates is not None
    scales = _scales(network.module, config.rates)
    if config.matrices == "adamw" or network.matrices is None:
        return adamw(network.rates, config, scales)
    if not network.matrices:
        raise InputError("optim.matrices=muon: this method names no matrices of blocks; set optim.matrices=adamw")
    return muon(network.rates, network.matrices, config, scales)


def check_patterns(networks: Iterable[Network], rates: Mapping[str, float]) -> None:
    """Raise InputError for a pattern of `optim.rates` that matches no trained parameter."""
    names = [name for n in networks if n.trained for name, p in n.module.named_parameters() if p.requires_grad]
    for pattern in rates:
        if not any(fnmatchcase(name, pattern) for name in names):
            example = ", ".join(dict.fromkeys(name.split(".")[0] + ".*" for name in names))
            raise InputError(f"optim.rates: {pattern!r} is the name of no trained parameter; names are {example}, such "
                             f"as {names[len(names) // 2]!r}")  # fmt: skip


def _scales(module: nn.Module, rates: Mapping[str, float]) -> dict[int, float]:
    """Relative learning rates by `id` of the parameter. The last pattern that matches a name counts."""
    found = {}
    for name, p in module.named_parameters():
        for pattern, rate in rates.items():
            if fnmatchcase(name, pattern):
                found[id(p)] = rate
    return found


def adamw(
    parts: Iterable[tuple[nn.Module, float]], config: OptimConfig, scales: Mapping[int, float] = _NONE
) -> torch.optim.AdamW:
    """Build AdamW over modules.

    Weight decay applies to the weights of linear layers and convolutions, found by module type and not by name. Every
    parameter group has `base_lr`, which the schedule multiplies.

    Args:
        parts: Modules to train, each with a factor on its learning rate.
        config: Learning rate and other settings.
        scales: Further factors on the learning rates of single parameters, by `id`.
    """
    groups = _groups(parts, config, set(), scales)
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.betas[0], config.betas[1]), eps=config.eps, fused=True)


def muon(
    parts: Iterable[tuple[nn.Module, float]],
    blocks: Iterable[nn.Module],
    config: OptimConfig,
    scales: Mapping[int, float] = _NONE,
) -> MatrixOptimizer:
    """Build Muon for the weights of linear layers and convolutions inside `blocks`, and AdamW for the rest of `parts`.

    Args:
        parts: Modules to train, each with a factor on the learning rate of its AdamW parameters.
        blocks: Modules whose matrices Muon updates.
        config: Learning rates and other settings of both optimizers.
        scales: Further factors on the learning rates of single parameters, by `id`.
    """
    layers = [layer for block in blocks for layer in block.modules() if isinstance(layer, _LAYERS)]
    matrices = [layer.weight for layer in layers if layer.weight.requires_grad]
    m = config.muon
    groups: list[dict[str, Any]] = [
        {**group, "muon": False, "momentum": 0.0} for group in _groups(parts, config, set(map(id, matrices)), scales)
    ]
    for scale, chosen in _by_scale(matrices, scales).items():
        lr = m.lr * scale
        groups.append(
            {"params": chosen, "lr": lr, "base_lr": lr, "weight_decay": m.weight_decay, "muon": True,
             "momentum": m.momentum}
        )  # fmt: skip
    return MatrixOptimizer(groups, lr=config.lr, betas=(config.betas[0], config.betas[1]), eps=config.eps, fused=True)


def _groups(
    parts: Iterable[tuple[nn.Module, float]], config: OptimConfig, without: set[int], scales: Mapping[int, float]
) -> list[dict[str, Any]]:
    """Parameter groups of AdamW: for each part, parameters with and without weight decay.

    Parameters whose `id` is in `without` are excluded.
    """
    groups = []
    for module, scale in parts:
        matrices = {id(layer.weight) for layer in module.modules() if isinstance(layer, _LAYERS)}
        trained = [p for p in module.parameters() if p.requires_grad and id(p) not in without]
        for decay, chosen in (
            (config.weight_decay, [p for p in trained if id(p) in matrices]),
            (0.0, [p for p in trained if id(p) not in matrices]),
        ):
            for further, alike in _by_scale(chosen, scales).items():
                lr = config.lr * scale * further
                groups.append({"params": alike, "lr": lr, "base_lr": lr, "weight_decay": decay})
    return groups


def _by_scale(parameters: Iterable[Tensor], scales: Mapping[int, float]) -> dict[float, list[Tensor]]:
    found: dict[float, list[Tensor]] = {}
    for p in parameters:
        found.setdefault(scales.get(id(p), 1.0), []).append(p)
    return found


def lr_factor(step: int, steps: int, config: OptimConfig) -> float:
    """Learning rate factor at step 0 .. steps - 1: linear warm-up, constant, decay towards `end_rate` at the end."""
    warmup = min(1.0, (step + 1) / max(1, config.warmup_steps))
    left = min(1.0, (steps - step) / max(1.0, steps * config.decay_fraction))
    if config.schedule == "cosine":
        left = 0.5 * (1.0 - math.cos(math.pi * left))
    return min(warmup, config.end_rate + (1.0 - config.end_rate) * left)
