"""FLOPs of a Wan transformer, for training all weights or adapters alone."""

from __future__ import annotations

from dataclasses import dataclass

from sora_train.core.cost import AdapterCost, Cost, Shapes
from sora_train.models.wan.settings import WanConfig


def cost(m: WanConfig, shapes: Shapes) -> Cost:
    """Forward FLOPs of a clip, adapters excluded."""
    self_attention = 4 * m.width**2
    cross_attention = 2 * m.width**2
    mlp = 2 * m.width * m.ffn
    per_block = 2 * (self_attention + cross_attention + mlp)
    ends = 2 * 2 * shapes.patch_features * m.width
    pairs = m.depth * 4 * m.width  # scores and weighted values
    per_text = 2 * (shapes.text_width * m.width + m.width**2) + m.depth * 2 * 2 * m.width**2
    return Cost(m.depth * per_block + ends, pairs, per_text, pairs, shapes.text_tokens)


@dataclass
class _Flow:
    """Sum of the FLOPs of a network with adapters; its methods are called in the order of the forward pass.

    The backward pass of a frozen layer computes the gradient of its input alone, and only if a layer before it is
    trained. `linear` and `attention` therefore return True if their output has a gradient.
    """

    rank: int
    targets: list[str]
    per_token: int = 0
    per_text: int = 0
    per_pair: int = 0
    per_text_pair: int = 0

    def linear(self, name: str, inputs: int, outputs: int, has_gradient: bool, text: bool = False) -> bool:
        """Add a layer's FLOPs per token, or per text token. `has_gradient`: its input has a gradient."""
        adapted = any(f".{name}".endswith(f".{target}") for target in self.targets)
        flops = 2 * inputs * outputs * (1 + has_gradient)
        if adapted:  # forward pass; gradients of A and B, of the value between A and B, and of the input
            down, up = 2 * inputs * self.rank, 2 * outputs * self.rank
            flops += (down + up) + (down + up) + up + down * has_gradient
        if text:
            self.per_text += flops
        else:
            self.per_token += flops
        return adapted or has_gradient

    def attention(self, width: int, has_gradient: bool, text: bool) -> bool:
        """Add attention's FLOPs per pair of tokens, or of token and text token."""
        flops = 4 * width * (3 if has_gradient else 1)  # scores and weighted values
        if text:
            self.per_text_pair += flops
        else:
            self.per_pair += flops
        return has_gradient


def adapter_cost(m: WanConfig, shapes: Shapes) -> AdapterCost:
    """FLOPs of forward and backward with all but the adapters frozen, layer by layer as in `model.py`."""
    flow = _Flow(m.lora.rank, m.lora.targets)
    linear, width = flow.linear, m.width
    # the timestep's layers run once per distinct timestep and aren't counted; their adapters need all blocks' gradients
    silent = _Flow(m.lora.rank, m.lora.targets)
    time = silent.linear("time_in.0", 1, 1, False)
    time = silent.linear("time_in.2", 1, 1, time)
    modulation = silent.linear("time_modulation.1", 1, 1, time)
    words = linear("text_in.0", shapes.text_width, width, False, text=True)
    words = linear("text_in.2", width, width, words, text=True)
    x = linear("patch_in", shapes.patch_features, width, False)
    for _ in range(m.depth):
        x = x or modulation
        heads = [linear(f"self_attention.{part}", width, width, x) for part in "qkv"]
        x |= linear("self_attention.out", width, width, flow.attention(width, any(heads), text=False))
        heads = [linear("cross_attention.q", width, width, x)]
        heads += [linear(f"cross_attention.{part}", width, width, words, text=True) for part in "kv"]
        x |= linear("cross_attention.out", width, width, flow.attention(width, any(heads), text=True))
        x = linear("mlp.2", m.ffn, width, linear("mlp.0", width, m.ffn, x)) or x
    linear("out.project", width, shapes.patch_features, x or time)
    return AdapterCost(Cost(flow.per_token, flow.per_pair, flow.per_text, flow.per_text_pair, shapes.text_tokens))
