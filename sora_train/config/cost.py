"""Geometry and cost of a configuration: the size of a token, and the operations of a clip in the trained network."""

from __future__ import annotations

from dataclasses import dataclass

from sora_train.config.schema import Config, Method
from sora_train.core.cost import TEXT_TOKENS, AdapterCost, Cost, Geometry


def geometry(config: Config) -> Geometry:
    """The token grid of a run; an autoencoder's tokens are its latent positions."""
    patch = 1 if config.method is Method.autoencoder else config.model.patch
    return Geometry(config.vae.temporal_stride, config.vae.spatial_stride, patch)


def patch_features(config: Config) -> int:
    """Numbers in one token's patch."""
    return config.vae.channels * config.model.patch**2


def cost(config: Config) -> Cost:
    """Forward cost of a clip in the network that is trained, without adapters."""
    return _autoencoder(config) if config.method is Method.autoencoder else _transformer(config)


def training_cost(config: Config) -> Cost | AdapterCost:
    """What training costs; packs are planned by `cost` in any case."""
    if config.model.lora.rank and config.method is Method.diffusion:
        return AdapterCost(_adapted(config))
    return cost(config)


def _transformer(config: Config) -> Cost:
    m, text = config.model, config.text_encoder
    self_attention = 4 * m.width**2
    cross_attention = 2 * m.width**2
    mlp = 2 * m.width * m.ffn
    per_block = 2 * (self_attention + cross_attention + mlp)
    ends = 2 * 2 * patch_features(config) * m.width
    pairs = m.depth * 4 * m.width  # scores and weighted values
    per_text = 2 * (text.width * m.width + m.width**2) + m.depth * 2 * 2 * m.width**2
    return Cost(m.depth * per_block + ends, pairs, per_text, pairs, text.pad_to or TEXT_TOKENS)


def _autoencoder(config: Config) -> Cost:
    """Convolutions per latent position, encoder and decoder alike; levels above the last count their finer grid."""
    v = config.vae
    flops, positions = 0, 1
    for level in reversed(range(len(v.widths))):
        width = v.widths[level]
        if level < len(v.strides):
            time, space = v.strides[level]
            positions *= time * space**2
            flops += 2 * 27 * width * v.widths[level + 1] * positions
        flops += 2 * v.blocks[level] * 2 * 27 * width**2 * positions
    ends = 27 * (3 * v.patch**2 * v.widths[0] * positions + 2 * v.channels * v.widths[-1])
    return Cost(2 * (flops + ends * 2), 0)


@dataclass
class _Flow:
    """Goes through the layers of a network with adapters in the order of its forward pass, and adds up FLOPs.

    A frozen layer's backward pass has the gradient of its input alone, and that only where something before it is
    trained. `linear` and `attention` return whether what they give has a gradient.
    """

    rank: int
    targets: list[str]
    per_token: int = 0
    per_text: int = 0
    per_pair: int = 0
    per_text_pair: int = 0

    def linear(self, name: str, inputs: int, outputs: int, has_gradient: bool, text: bool = False) -> bool:
        """Add a layer's FLOPs for a token, or for a text token; `has_gradient`: whether its input has one."""
        adapted = any(f".{name}".endswith(f".{target}") for target in self.targets)
        flops = 2 * inputs * outputs * (1 + has_gradient)
        if adapted:  # forward; gradients of A and B; of what is between them; of the input
            down, up = 2 * inputs * self.rank, 2 * outputs * self.rank
            flops += (down + up) + (down + up) + up + down * has_gradient
        if text:
            self.per_text += flops
        else:
            self.per_token += flops
        return adapted or has_gradient

    def attention(self, width: int, has_gradient: bool, text: bool) -> bool:
        flops = 4 * width * (3 if has_gradient else 1)  # scores and weighted values
        if text:
            self.per_text_pair += flops
        else:
            self.per_pair += flops
        return has_gradient


def _adapted(config: Config) -> Cost:
    """Forward and backward of the transformer with all but its adapters frozen, layer by layer as in models/dit.py."""
    m, e = config.model, config.text_encoder
    flow = _Flow(m.lora.rank, m.lora.targets)
    linear, width = flow.linear, m.width
    # the timesteps' layers run once per distinct timestep and aren't counted, but their adapters send gradients on
    silent = _Flow(m.lora.rank, m.lora.targets)
    time = silent.linear("time_in.0", 1, 1, False)
    time = silent.linear("time_in.2", 1, 1, time)
    modulation = silent.linear("time_modulation.1", 1, 1, time)
    words = linear("text_in.0", e.width, width, False, text=True)
    words = linear("text_in.2", width, width, words, text=True)
    x = linear("patch_in", patch_features(config), width, False)
    for _ in range(m.depth):
        x = x or modulation
        heads = [linear(f"self_attention.{part}", width, width, x) for part in "qkv"]
        x |= linear("self_attention.out", width, width, flow.attention(width, any(heads), text=False))
        heads = [linear("cross_attention.q", width, width, x)]
        heads += [linear(f"cross_attention.{part}", width, width, words, text=True) for part in "kv"]
        x |= linear("cross_attention.out", width, width, flow.attention(width, any(heads), text=True))
        x = linear("mlp.2", m.ffn, width, linear("mlp.0", width, m.ffn, x)) or x
    linear("out.project", width, patch_features(config), x or time)
    return Cost(flow.per_token, flow.per_pair, flow.per_text, flow.per_text_pair, e.pad_to or TEXT_TOKENS)
