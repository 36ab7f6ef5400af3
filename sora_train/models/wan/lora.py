"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685) of frozen linear layers.

An adapted layer computes W x + alpha / rank B A x. A starts random and B zero, so that the output is unchanged at
first. Only A and B are trained, averaged (EMA), saved in checkpoints and exported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from sora_train.config.schema import LoraConfig
from sora_train.core.cli import InputError

_DOWN, _UP = ".lora_A.default.weight", ".lora_B.default.weight"  # A and B, as peft names them in the network


def targeted(network: nn.Module, targets: Sequence[str]) -> list[str]:
    """Names of the linear layers whose dotted names end in one of `targets` (`q`, `self_attention.q`)."""
    ends = tuple(f".{target}" for target in targets)
    return [
        name for name, layer in network.named_modules() if isinstance(layer, nn.Linear) and f".{name}".endswith(ends)
    ]


def add_adapters(network: nn.Module, dit: nn.Module, lora: LoraConfig) -> None:
    """Freeze `network` and add adapters to the targeted layers of its submodule `dit`.

    A is drawn from torch's default generator. Raises InputError if peft isn't installed.
    """
    try:
        from peft import LoraConfig as PeftConfig  # takes seconds to import
        from peft import inject_adapter_in_model
    except ImportError as error:
        raise InputError(f"model.lora needs peft ({error}); pip install -e '.[models]'") from error
    network.requires_grad_(False)
    names = targeted(dit, lora.targets)
    inject_adapter_in_model(PeftConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=names), dit)
    trained = {name for name, p in dit.named_parameters() if p.requires_grad}
    if trained != {name + part for name in names for part in (_DOWN, _UP)}:
        raise RuntimeError("peft adapted other layers than it was told to")


class Outline(nn.Module):
    """Layer with the computation and memory of peft's adapted layer; for forecasts with fake tensors."""

    def __init__(self, base: nn.Linear, lora: LoraConfig) -> None:
        super().__init__()
        self.base, self.factor = base, lora.alpha / lora.rank
        self.down = nn.Linear(base.in_features, lora.rank, bias=False)
        self.up = nn.Linear(lora.rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Compute W x + alpha / rank B A x."""
        return self.base(x) + self.up(self.down(x)) * self.factor


def add_outlines(network: nn.Module, dit: nn.Module, lora: LoraConfig) -> None:
    """Freeze `network` and replace the targeted layers of its submodule `dit` by `Outline`s."""
    network.requires_grad_(False)
    for name in targeted(dit, lora.targets):
        owner, _, part = name.rpartition(".")
        setattr(dit.get_submodule(owner), part, Outline(dit.get_submodule(name), lora))  # type: ignore[arg-type]


def merge(weights: Mapping[str, Tensor], adapters: Mapping[str, Tensor], lora: LoraConfig) -> dict[str, Tensor]:
    """Merge adapters into the weights: each adapted W becomes W + alpha / rank B A."""
    merged = dict(weights)
    for name, down, up in pairs(adapters):
        merged[f"{name}.weight"] = torch.addmm(weights[f"{name}.weight"], up, down, alpha=lora.alpha / lora.rank)
    return merged


def pairs(adapters: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield the name of the adapted layer, A and B of each adapter."""
    for key, down in adapters.items():
        if key.endswith(_DOWN):
            name = key.removesuffix(_DOWN)
            yield name, down, adapters[name + _UP]
