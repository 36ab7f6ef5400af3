"""Configuration keys of the Wan family, in addition to those of all families."""

from __future__ import annotations

from dataclasses import dataclass

from sora_train.config.schema import ModelConfig

ACTIVATIONS = ("gelu", "relu2")
ROPE_SCALINGS = ("none", "interpolation", "ntk")


@dataclass
class WanConfig(ModelConfig):
    """A diffusion transformer of the Wan family."""

    family: str = "wan"
    frequencies: int = 256  # values of the sinusoidal timestep embedding
    rope_theta: float = 10000.0  # base of RoPE's frequencies
    gate_init: float = 0.0  # initial value of the blocks' gates; 0 is adaLN-zero
    pooled_text: bool = False  # add the caption's mean embedding to the timestep's; short runs need it to use captions
    absolute_positions: bool = False  # give each token its absolute position too, beside RoPE; helps small models
    activation: str = "gelu"  # of the MLPs: gelu (its tanh form), relu2 (the square of ReLU)
    rope_scaling: str = "none"  # for clips longer or larger than trained: none, interpolation, ntk
    rope_factors: tuple[float, float, float] = (1.0, 1.0, 1.0)  # new / trained length of time, height, width
