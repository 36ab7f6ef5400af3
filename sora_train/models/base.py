"""The contract of a model family.

To add a family, write a folder like `wan/` (`models/wan/README.md` describes it) with an object that satisfies
`Family`. The families of this package are listed in `config/registry.py`; a plugin calls
`FAMILIES.register(NAME, family)`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from sora_train.config.schema import Config, ModelConfig
from sora_train.core.cost import AdapterCost, Cost, Shapes


class Family(Protocol):
    """A family of diffusion transformers.

    The module of the object must not import torch at its top, because configurations are checked with it.
    """

    settings: type[ModelConfig]  # dataclass of its keys under `model`
    adapter_targets: tuple[str, ...]  # suffixes of the names of linear layers that LoRA may adapt
    alike: bool  # all blocks have the same layers and shapes, so that a forecast need only trace a few of them

    def rules(self, config: Config) -> None:
        """Check the keys that only this family has. Raises InputError."""

    def released_shape(self, path: str) -> dict[str, Any]:
        """Keys of `model` that are determined by released weights, and `channels` and `text_width` in addition.

        Raises InputError if the folder at `path` holds no weights of the family.
        """

    def cost(self, config: ModelConfig, shapes: Shapes) -> Cost:
        """Forward FLOPs of a clip."""

    def adapter_cost(self, config: ModelConfig, shapes: Shapes) -> AdapterCost:
        """FLOPs of training adapters alone (`model.lora`)."""

    def build(self, config: ModelConfig, shapes: Shapes) -> nn.Module:
        """Build the network, randomly initialised. Its `forward` has the signature of `models.wan.model.DiT`'s."""

    def blocks(self, network: nn.Module) -> Sequence[nn.Module]:
        """The transformer blocks, which are compiled, recomputed and gathered (ZeRO-3) one by one.

        Each has a submodule `self_attention` whose attribute `attend` is its attention function.
        """

    def load(self, network: nn.Module, path: str) -> None:
        """Copy released weights into the network. Raises InputError that lists tensors that don't match."""

    def save(
        self,
        weights: Mapping[str, Tensor],
        config: ModelConfig,
        text_width: int,
        folder: Path,
        shard_gib: float,
        *,
        layout: str = "diffusers",
    ) -> None:
        """Write weights in the released format, in files of at most `shard_gib`.

        In the names of diffusers, or (layout `original`) of the family's own repository.

        Raises InputError if it can't express an option of the model.
        """

    def save_adapters(self, adapters: Mapping[str, Tensor], config: ModelConfig, folder: Path, layout: str) -> None:
        """Write adapters alone, in the names of diffusers, or (layout `original`) of the family's own repository.

        Raises InputError if the format can't express an option of the model.
        """

    def start_adapters(self, network: nn.Module, path: str, config: ModelConfig) -> None:
        """Set the network's adapters to those of a file. Raises InputError if they don't match."""

    def add_adapter_file(self, network: nn.Module, path: str, factor: float) -> None:
        """Add the adapters of a file, times `factor`, to the weights. Raises InputError if they don't match."""
