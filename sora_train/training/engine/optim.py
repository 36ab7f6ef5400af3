"""AdamW, its parameter groups and its learning rate schedule."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from sora_train.config.schema import OptimConfig


def adamw(parts: Iterable[tuple[nn.Module, float]], config: OptimConfig) -> torch.optim.AdamW:
    """Build AdamW over modules, each with a factor on its learning rate.

    Weight decay applies to the weights of linear layers and convolutions, found by module type and not by name. Every
    parameter group has `base_lr`, which the schedule multiplies.
    """
    groups = []
    for module, scale in parts:
        matrices = {
            id(layer.weight)
            for layer in module.modules()
            if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
        }
        trained = [p for p in module.parameters() if p.requires_grad]
        for decay, chosen in (
            (config.weight_decay, [p for p in trained if id(p) in matrices]),
            (0.0, [p for p in trained if id(p) not in matrices]),
        ):
            if chosen:
                lr = config.lr * scale
                groups.append({"params": chosen, "lr": lr, "base_lr": lr, "weight_decay": decay})
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.betas[0], config.betas[1]), eps=config.eps, fused=True)


def lr_factor(step: int, steps: int, config: OptimConfig) -> float:
    """Learning rate factor at step 0 .. steps - 1: linear warm-up, constant, linear decay towards 0 at the end."""
    warmup = min(1.0, (step + 1) / max(1, config.warmup_steps))
    decay = (steps - step) / max(1.0, steps * config.decay_fraction)
    return min(warmup, decay, 1.0)
