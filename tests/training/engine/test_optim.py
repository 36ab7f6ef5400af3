"""Which weights decay, how fast each part learns, and the course of the learning rate."""

from __future__ import annotations

from itertools import pairwise

import pytest
from torch import nn

from sora_train.config.schema import OptimConfig
from sora_train.models.text.encoder import TextEncoder
from sora_train.models.video_vae.model import VideoVAE
from sora_train.models.wan.model import DiT
from sora_train.training.engine.optim import adamw, lr_factor

CONFIG = OptimConfig(lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-7, warmup_steps=10, decay_fraction=0.5)


def decaying(module: nn.Module) -> dict[str, bool]:
    groups = adamw([(module, 1.0)], CONFIG).param_groups
    decay = {id(p): group["weight_decay"] > 0 for group in groups for p in group["params"]}
    assert sorted(decay) == sorted(id(p) for p in module.parameters())
    return {name: decay[id(p)] for name, p in module.named_parameters()}


def test_matrices_decay_and_nothing_else_does() -> None:
    dit = decaying(DiT(8, 24, 1, 2, 48, 16))
    assert {name for name, yes in dit.items() if yes} == {n for n in dit if n.endswith("weight") and "norm" not in n}
    assert not dit["blocks.0.modulation"] and not dit["out.modulation"]
    text = decaying(TextEncoder(16, 1, 2, 64))
    assert not text["words.weight"] and text["layers.0.qkv.weight"]
    vae = decaying(VideoVAE(4, 4, [8, 8], [0, 1], [(4, 1)]))
    assert (
        vae["encoder.layers.0.weight"]
        and not vae["encoder.layers.0.bias"]
        and not vae["encoder.layers.2.layers.0.scale"]
    )


def test_each_part_has_its_own_rate_and_the_schedule_knows_it() -> None:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    groups = adamw([(first, 1.0), (second, 0.3)], CONFIG).param_groups
    assert [g["base_lr"] for g in groups] == pytest.approx([1e-3, 1e-3, 3e-4, 3e-4])
    assert [g["lr"] for g in groups] == [g["base_lr"] for g in groups]
    assert {(g["betas"], g["eps"]) for g in groups} == {((0.9, 0.95), 1e-7)}


def test_frozen_weights_are_left_out() -> None:
    layer = nn.Linear(2, 2)
    layer.weight.requires_grad_(False)
    assert [len(g["params"]) for g in adamw([(layer, 1.0)], CONFIG).param_groups] == [1]


def test_the_rate_warms_up_stays_and_falls_to_nearly_nothing() -> None:
    factors = [lr_factor(step, 100, CONFIG) for step in range(100)]
    assert factors[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert set(factors[9:51]) == {1.0}
    assert factors[75] == pytest.approx(0.5) and factors[99] == pytest.approx(0.02)
    assert all(a > b > 0 for a, b in pairwise(factors[50:]))


@pytest.mark.parametrize(("warmup", "decay", "steps"), [(0, 0.0, 10), (0, 1.0, 1), (50, 0.5, 10)])
def test_the_rate_is_sane_for_odd_settings(warmup: int, decay: float, steps: int) -> None:
    config = OptimConfig(warmup_steps=warmup, decay_fraction=decay)
    assert all(0.0 < lr_factor(step, steps, config) <= 1.0 for step in range(steps))
