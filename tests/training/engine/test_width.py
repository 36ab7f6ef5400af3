"""Learning rates that are transferred between widths (muP): the groups they make, and the coordinate check."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from omegaconf import DictConfig
from torch import nn

from sora_train.config.load import build
from sora_train.config.schema import Config
from sora_train.core.batch import Layout
from sora_train.core.cli import InputError
from sora_train.methods.base import Network
from sora_train.models.video_model import base_shapes, build_video_model
from sora_train.training.engine.optim import optimizer_of

Compose = Callable[..., DictConfig]
CLIPS, GRID, WORDS = 4, (3, 4, 4), 6


def configured(compose_tree: Compose, width: int, *overrides: str) -> Config:
    """The demo's network at a width, with heads of 32 and an MLP of four times the width."""
    shape = (f"model.width={width}", f"model.heads={width // 32}", f"model.ffn={4 * width}", "model.depth=2")
    return build(compose_tree("experiment=demo", *shape, "optim.matrices=adamw", *overrides), need_vae=False)


def transformer(config: Config) -> Network:
    """The transformer of a configuration, without a text encoder."""
    torch.manual_seed(0)
    dit = build_video_model(config).dit
    shapes = base_shapes(config)
    own = {name.removeprefix("dit."): shape for name, shape in shapes.items()} if shapes else None
    return Network(dit, [(dit, 1.0)], matrices=list(dit.blocks), base_shapes=own)


def outputs_after(config: Config, steps: int) -> dict[str, float]:
    """RMS of each block's output and of the network's after some steps on a task made up of its inputs."""
    network, outputs = transformer(config), {}
    dit, optimizer = network.module, optimizer_of(network, config.optim)

    def watch(name: str, module: nn.Module) -> None:
        module.register_forward_hook(lambda m, i, o: outputs.update({name: float(o.detach().square().mean().sqrt())}))

    watch("output", dit)
    for number, block in enumerate(dit.blocks):
        watch(f"block {number}", block)
    layout = Layout((GRID,) * CLIPS, (WORDS,) * CLIPS)
    values, words = dit.patch_in.in_features, dit.text_in[0].in_features
    rng = torch.Generator().manual_seed(1)
    from_patch = torch.randn(values, values, generator=rng) / values**0.5
    from_text = torch.randn(words, values, generator=rng) / words**0.5
    clip_of_token = torch.arange(CLIPS).repeat_interleave(layout.tokens // CLIPS)
    for _ in range(steps):
        x_NP = torch.randn(layout.tokens, values, generator=rng)
        text_LE = torch.randn(CLIPS * WORDS, words, generator=rng)
        means = text_LE.unflatten(0, (CLIPS, WORDS)).mean(1)
        target_NP = torch.tanh(x_NP @ from_patch) + (means @ from_text)[clip_of_token]
        output_NP = dit(x_NP, text_LE, torch.rand(CLIPS, generator=rng), clip_of_token, layout, torch.arange(CLIPS))
        (output_NP - target_NP).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return outputs


def test_activations_after_ten_steps_are_alike_at_every_width(compose_tree: Compose) -> None:
    """The coordinate check (Yang et al. 2022, appendix D.1): within 20%; without transfer the output grows."""

    def grown(*overrides: str) -> dict[str, float]:
        narrow, wide = (
            outputs_after(configured(compose_tree, width, "optim.lr=3e-3", *overrides), 10) for width in (64, 256)
        )
        return {name: wide[name] / narrow[name] for name in narrow}

    assert all(0.8 < ratio < 1.2 for ratio in grown("optim.base_width=64").values())
    assert grown()["output"] > 1.8


def rates(config: Config) -> dict[str, tuple[float, float]]:
    """Learning rate and weight decay of each parameter, relative to those of the configuration."""
    network = transformer(config)
    optimizer = optimizer_of(network, config.optim)
    found = {id(p): (g["base_lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    return {name: found[id(p)] for name, p in network.module.named_parameters()}


def test_matrices_whose_inputs_grow_learn_slower(compose_tree: Compose) -> None:
    plain, scaled = (
        rates(configured(compose_tree, 256, f"optim.base_width={base}", "++optim.rates={blocks.0.*: 0.5}"))
        for base in (0, 64)
    )
    factors = {name: scaled[name][0] / plain[name][0] for name in plain}
    slower = {name for name, factor in factors.items() if factor == pytest.approx(0.25)}
    assert all(factor == pytest.approx(1.0) for name, factor in factors.items() if name not in slower)
    assert {"text_in.2.weight", "time_in.2.weight", "time_modulation.1.weight", "out.project.weight"} < slower
    assert {"blocks.0.mlp.0.weight", "blocks.0.mlp.2.weight", "blocks.1.self_attention.q.weight"} < slower
    assert not {"patch_in.weight", "text_in.0.weight", "blocks.0.mlp.0.bias", "blocks.0.modulation"} & slower
    assert plain["blocks.0.mlp.0.weight"][0] == pytest.approx(0.5 * plain["blocks.1.mlp.0.weight"][0])
    for name in plain:  # what a step takes off a weight doesn't change
        assert scaled[name][0] * scaled[name][1] == pytest.approx(plain[name][0] * plain[name][1]), name


def test_muon_is_scaled_by_the_root_of_the_larger_side(compose_tree: Compose) -> None:
    plain, scaled = (
        rates(configured(compose_tree, 256, f"optim.base_width={base}", "optim.matrices=muon")) for base in (0, 64)
    )
    for name in ("blocks.0.mlp.0.weight", "blocks.0.mlp.2.weight", "blocks.1.cross_attention.v.weight"):
        assert scaled[name][0] / plain[name][0] == pytest.approx(0.5), name
    assert scaled["out.project.weight"][0] / plain["out.project.weight"][0] == pytest.approx(0.25)  # AdamW's


def test_what_has_no_width_is_refused(compose_tree: Compose) -> None:
    for overrides, message in (
        (("optim.base_width=48",), "optim.base_width=48 must be a multiple of the size of a head"),
        (("optim.base_width=64", "model.lora.rank=2"), "set it to 0 to train adapters"),
        (("optim.base_width=-64",), "must not be below 0"),
    ):
        with pytest.raises(InputError, match=message):
            configured(compose_tree, 128, *overrides)
    config = configured(compose_tree, 64, "optim.base_width=64")
    with pytest.raises(InputError, match="this method's network has no width"):
        optimizer_of(replace(transformer(config), base_shapes=None), config.optim)
