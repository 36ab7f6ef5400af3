"""The optimizer of a network, its parameter groups and its learning rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sora_train.config.schema import OptimConfig
from sora_train.core.cli import InputError
from sora_train.methods.base import Network
from sora_train.training.engine.muon import MatrixOptimizer

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Scale(NamedTuple):
    """Factors on a parameter's learning rate: `rate` of `optim.rates`, `width` of `optim.base_width`.

    Weight decay is divided by `width`, so that a step shrinks a weight alike at every width.
    """

    rate: float = 1.0
    width: float = 1.0


_NONE: Mapping[int, Scale] = {}


def optimizer_of(network: Network, config: OptimConfig) -> torch.optim.AdamW:
    """Build the optimizer of a network: AdamW, or Muon if `optim.matrices` is muon and the network isn't adapters.

    Raises InputError for Muon if the network's `matrices` are empty, and for `optim.base_width` if it has no
    `base_shapes`.
    """
    assert network.rates is not None
    if config.base_width and network.base_shapes is None:
        raise InputError(f"optim.base_width={config.base_width}: this method's network has no width to transfer "
                         "learning rates between; set it to 0")  # fmt: skip
    scales = _scales(network, config)
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


def _scales(network: Network, config: OptimConfig) -> dict[int, Scale]:
    """Factors on the learning rates by `id` of the parameter. The last pattern that matches a name counts."""
    layers = {id(layer.weight) for layer in network.module.modules() if isinstance(layer, _LAYERS)}
    inside = {id(p) for block in network.matrices or () for p in block.parameters()}
    found = {}
    for name, p in network.module.named_parameters():
        matching = [rate for pattern, rate in config.rates.items() if fnmatchcase(name, pattern)]
        width = 1.0
        if network.base_shapes is not None and id(p) in layers:
            by_muon = config.matrices == "muon" and id(p) in inside
            width = _width_factor(tuple(p.shape), network.base_shapes[name], by_muon)
        if matching or width != 1.0:
            found[id(p)] = Scale(matching[-1] if matching else 1.0, width)
    return found


def _width_factor(shape: tuple[int, ...], base: tuple[int, ...], by_muon: bool) -> float:
    """Learning rate of a matrix relative to that of the same matrix at the base width.

    An update must change a layer's outputs by as much at every width. AdamW's elements are of one size and add up over
    the inputs, so the factor is the inverse ratio of inputs (muP: Yang et al. 2022, arXiv 2203.03466, table 8; for
    diffusion transformers Zheng et al. 2025, arXiv 2505.15270). Muon's updates have a spectral norm that grows with the
    square root of the larger side (`muon._RMS`).
    """
    if by_muon:
        return math.sqrt(max(base[0], math.prod(base[1:])) / max(shape[0], math.prod(shape[1:])))
    return math.prod(base[1:]) / math.prod(shape[1:])


def adamw(
    parts: Iterable[tuple[nn.Module, float]], config: OptimConfig, scales: Mapping[int, Scale] = _NONE
) -> torch.optim.AdamW:
    """Build AdamW over modules.

    Weight decay applies to the weights of linear layers and convolutions, found by module type and not by name. Every
    parameter group has `base_lr`, which the schedule multiplies.

    Args:
        parts: Modules to train, each with a factor on its learning rate.
        config: Learning rate and other settings.
        scales: Further factors on single parameters, by `id`.
    """
    groups = _groups(parts, config, set(), scales)
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.betas[0], config.betas[1]), eps=config.eps, fused=True)


def muon(
    parts: Iterable[tuple[nn.Module, float]],
    blocks: Iterable[nn.Module],
    config: OptimConfig,
    scales: Mapping[int, Scale] = _NONE,
) -> MatrixOptimizer:
    """Build Muon for the weights of linear layers and convolutions inside `blocks`, and AdamW for the rest of `parts`.

    Args:
        parts: Modules to train, each with a factor on the learning rate of its AdamW parameters.
        blocks: Modules whose matrices Muon updates.
        config: Learning rates and other settings of both optimizers.
        scales: Further factors on single parameters, by `id`.
    """
    layers = [layer for block in blocks for layer in block.modules() if isinstance(layer, _LAYERS)]
    matrices = [layer.weight for layer in layers if layer.weight.requires_grad]
    m = config.muon
    groups: list[dict[str, Any]] = [
        {**group, "muon": False, "momentum": 0.0} for group in _groups(parts, config, set(map(id, matrices)), scales)
    ]
    for scale, chosen in _by_scale(matrices, scales).items():
        lr = m.lr * scale.rate * scale.width
        groups.append(
            {"params": chosen, "lr": lr, "base_lr": lr, "weight_decay": m.weight_decay / scale.width, "muon": True,
             "momentum": m.momentum}
        )  # fmt: skip
    return MatrixOptimizer(groups, lr=config.lr, betas=(config.betas[0], config.betas[1]), eps=config.eps, fused=True)


def _groups(
    parts: Iterable[tuple[nn.Module, float]], config: OptimConfig, without: set[int], scales: Mapping[int, Scale]
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
                lr = config.lr * scale * further.rate * further.width
                groups.append({"params": alike, "lr": lr, "base_lr": lr, "weight_decay": decay / further.width})
    return groups


def _by_scale(parameters: Iterable[Tensor], scales: Mapping[int, Scale]) -> dict[Scale, list[Tensor]]:
    found: dict[Scale, list[Tensor]] = {}
    for p in parameters:
        found.setdefault(scales.get(id(p), Scale()), []).append(p)
    return found


def lr_factor(step: int, steps: int, config: OptimConfig) -> float:
    """Learning rate factor at step 0 .. steps - 1: linear warm-up, constant, decay towards `end_rate` at the end."""
    warmup = min(1.0, (step + 1) / max(1, config.warmup_steps))
    left = min(1.0, (steps - step) / max(1.0, steps * config.decay_fraction))
    if config.schedule == "cosine":
        left = 0.5 * (1.0 - math.cos(math.pi * left))
    return min(warmup, config.end_rate + (1.0 - config.end_rate) * left)
