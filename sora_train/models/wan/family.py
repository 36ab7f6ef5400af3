"""The Wan family behind the contract of `models/base.py`. Imports torch only where a network is built or read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sora_train.config.rules import require
from sora_train.config.schema import Config, ModelConfig
from sora_train.core.cli import nearest
from sora_train.core.cost import AdapterCost, Cost, Shapes
from sora_train.models.wan.cost import adapter_cost, cost
from sora_train.models.wan.released import transformer_shape
from sora_train.models.wan.settings import ACTIVATIONS, ROPE_SCALINGS, WanConfig

if TYPE_CHECKING:
    from torch import Tensor, nn


class Wan:
    """Implementation of `models.base.Family` for Wan 2.1 and 2.2 transformers."""

    settings = WanConfig
    alike = True
    adapter_targets = (
        "q", "k", "v", "out", "self_attention.q", "self_attention.k", "self_attention.v", "self_attention.out",
        "cross_attention.q", "cross_attention.k", "cross_attention.v", "cross_attention.out", "mlp.0", "mlp.2",
        "text_in.0", "text_in.2", "time_in.0", "time_in.2", "time_modulation.1", "out.project",
    )  # fmt: skip

    def rules(self, config: Config) -> None:
        """Check the activation and the keys of RoPE scaling."""
        model = _own(config.model)
        require(
            model.activation in ACTIVATIONS,
            f"model.activation={model.activation}; {nearest(model.activation, list(ACTIVATIONS))}",
        )
        scaling = model.rope_scaling
        require(scaling in ROPE_SCALINGS, f"model.rope_scaling={scaling}; {nearest(scaling, list(ROPE_SCALINGS))}")
        factors = list(model.rope_factors)
        require(
            len(factors) == 3 and min(factors) >= 1.0,
            f"model.rope_factors={factors} must be three, none below 1: time, height, width",
        )
        require(
            scaling != "none" or max(factors) == 1.0,
            f"model.rope_factors={factors} say nothing with model.rope_scaling=none; "
            "choose interpolation or ntk, or leave them at 1",
        )

    def released_shape(self, path: str) -> dict[str, Any]:
        """Shape of a Wan transformer, of diffusers or of Wan's own repository."""
        return transformer_shape(path)

    def cost(self, config: ModelConfig, shapes: Shapes) -> Cost:
        """Forward FLOPs of a clip."""
        return cost(_own(config), shapes)

    def adapter_cost(self, config: ModelConfig, shapes: Shapes) -> AdapterCost:
        """FLOPs of training adapters alone."""
        return adapter_cost(_own(config), shapes)

    def build(self, config: ModelConfig, shapes: Shapes) -> nn.Module:
        """Build a DiT, randomly initialised."""
        from sora_train.models.wan.model import build_dit

        return build_dit(_own(config), shapes)

    def blocks(self, network: nn.Module) -> Sequence[nn.Module]:
        """The transformer's blocks."""
        return list(network.get_submodule("blocks").children())

    def load(self, network: nn.Module, path: str) -> None:
        """Copy the weights of a folder of diffusers, or of a folder or file of Wan's own repository."""
        from sora_train.models.wan.convert import load_wan

        load_wan(network, path)

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
        """Write a folder of diffusers, or of Wan's own repository."""
        from sora_train.models.wan.convert import save_wan

        save_wan(weights, _own(config), text_width, folder, shard_gib, layout=layout)

    def save_adapters(self, adapters: Mapping[str, Tensor], config: ModelConfig, folder: Path, layout: str) -> None:
        """Write a file that `WanPipeline.load_lora_weights` reads, or one in the names of Wan's own repository."""
        from sora_train.models.wan.convert import save_adapters

        save_adapters(adapters, _own(config), folder, layout)

    def start_adapters(self, network: nn.Module, path: str, config: ModelConfig) -> None:
        """Set the adapters to those of a file, in any of the names of `add_adapter_file`."""
        from sora_train.models.wan.adapter_files import start_adapters

        start_adapters(network, path, config.lora)

    def add_adapter_file(self, network: nn.Module, path: str, factor: float) -> None:
        """Add adapters in the names of diffusers, peft, Wan's own repository or kohya's scripts."""
        from sora_train.models.wan.adapter_files import add_to_weights

        add_to_weights(network, path, factor)


def _own(config: ModelConfig) -> WanConfig:
    assert isinstance(config, WanConfig)
    return config


WAN = Wan()
