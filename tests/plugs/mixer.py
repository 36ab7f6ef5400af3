"""A model family as a plugin: attention within a clip, then an MLP; the timestep and the caption's mean are added."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sora_train.config.registry import FAMILIES
from sora_train.config.rules import require
from sora_train.config.schema import Config, ModelConfig
from sora_train.core.cost import Cost, Shapes
from sora_train.models.layers.attention import host_lengths
from sora_train.models.wan.model import Attention


@dataclass
class MixerConfig(ModelConfig):
    family: str = "mixer"
    sharpness: float = 1.0  # factor on the timestep


class Layer(nn.Module):
    def __init__(self, c: MixerConfig) -> None:
        super().__init__()
        self.self_attention = Attention(c.width, c.heads, 1e-6, c.attention)
        self.mlp = nn.Sequential(nn.LayerNorm(c.width), nn.Linear(c.width, c.ffn), nn.GELU(), nn.Linear(c.ffn, c.width))

    def forward(self, x_ND: Tensor, lengths: Tensor) -> Tensor:
        x_ND = x_ND + self.self_attention(x_ND, x_ND, lengths, lengths)
        return x_ND + self.mlp(x_ND)


class Mixer(nn.Module):
    def __init__(self, c: MixerConfig, shapes: Shapes) -> None:
        super().__init__()
        self.sharpness = c.sharpness
        self.into, self.text, self.time = (nn.Linear(n, c.width) for n in (shapes.patch_features, shapes.text_width, 1))
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.depth))
        self.out = nn.Linear(c.width, shapes.patch_features)

    def forward(
        self, x_NP: Tensor, text_LE: Tensor, t_M: Tensor, t_of_N: Tensor, layout: Any, clip_of_M: Any = None
    ) -> Tensor:
        time = self.time(self.sharpness * t_M[t_of_N].unsqueeze(1).type_as(x_NP))
        text = torch.stack([part.mean(0) for part in self.text(text_LE).split(layout.texts)])
        x_ND = (
            self.into(x_NP)
            + time
            + text.repeat_interleave(host_lengths(layout.queries).to(x_NP.device), dim=0, output_size=len(x_NP))
        )
        for layer in self.layers:
            x_ND = layer(x_ND, host_lengths(layout.lengths))
        return self.out(x_ND)


class Family:
    settings, adapter_targets, alike = MixerConfig, ("mlp.1", "mlp.3"), True

    def rules(self, config: Config) -> None:
        require(config.model.sharpness > 0, f"model.sharpness={config.model.sharpness} must be above 0")  # type: ignore[attr-defined]

    def cost(self, c: Any, shapes: Shapes) -> Cost:
        return Cost(c.depth * (8 * c.width**2 + 4 * c.width * c.ffn), c.depth * 4 * c.width)

    def build(self, c: Any, shapes: Shapes) -> nn.Module:
        return Mixer(c, shapes)

    def blocks(self, network: Any) -> list[nn.Module]:
        return list(network.layers)


FAMILIES.register("mixer", Family())
