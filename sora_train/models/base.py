"""The contract of a model family. To add one: a folder beside `wan/` with an object like this, registered by name.

The families of this package are listed in `config/registry.py`; a plugin calls `FAMILIES.register(NAME, family)`.
`models/wan/README.md` walks through one. Nothing here is imported by a family: it is what they have in common.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from sora_train.config.schema import Config, ModelConfig
from sora_train.core.cost import AdapterCost, Cost, Shapes


class Family(Protocol):
    """A family of diffusion transformers. Importing the object must import no torch: it checks configurations."""

    settings: type[ModelConfig]  # dataclass of its keys under `model`
    adapter_targets: tuple[str, ...]  # linear layers that LoRA may adapt, by the ends of their names

    def rules(self, config: Config) -> None:
        """Check the keys that only this family has. Raises InputError."""

    def released_shape(self, path: str) -> dict[str, Any]:
        """Keys of `model` that released weights fix, beside `channels` and `text_width`. Raises InputError."""

    def cost(self, config: ModelConfig, shapes: Shapes) -> Cost:
        """Forward FLOPs of a clip."""

    def adapter_cost(self, config: ModelConfig, shapes: Shapes) -> AdapterCost:
        """FLOPs of training adapters alone (`model.lora`)."""

    def build(self, config: ModelConfig, shapes: Shapes) -> nn.Module:
        """The network, freshly initialised. Its forward takes the arguments of `models/wan/model.py`'s `DiT`."""

    def blocks(self, network: nn.Module) -> Sequence[nn.Module]:
        """The blocks: the unit of compile and recomputation. Each has a `self_attention` with an `attend` function."""

    def load(self, network: nn.Module, path: str) -> None:
        """Copy released weights into the network. Raises InputError that lists what doesn't fit."""

    def save(self, weights: Mapping[str, Tensor], config: ModelConfig, text_width: int, folder: Path) -> None:
        """Write weights in the released form. Raises InputError where the form lacks an option."""

    def save_adapters(self, adapters: Mapping[str, Tensor], config: ModelConfig, folder: Path) -> None:
        """Write adapters alone in the released form. Raises InputError where the form lacks an option."""

    def add_adapter_file(self, network: nn.Module, path: str, factor: float) -> None:
        """Add the adapters of a file, times `factor`, to the weights. Raises InputError where they don't fit."""
