"""Which weights decay, how fast each part learns, and the course of the learning rate."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn

from sora_train.config.schema import OptimConfig
from sora_train.core.cli import InputError
from sora_train.methods.base import Network
from sora_train.models.text.encoder import TextEncoder
from sora_train.models.video_vae.model import VideoVAE
from sora_train.models.wan.model import DiT
from sora_train.training.engine.optim import adamw, check_patterns, lr_factor, optimizer_of

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


def test_patterns_of_names_have_their_own_rates_and_the_last_one_counts() -> None:
    network = nn.ModuleDict({"text": nn.Linear(2, 2), "dit": nn.Linear(2, 2)})
    rates = {"text.*": 0.0, "*.bias": 0.5, "text.bias": 2.0}
    optimizer = optimizer_of(Network(network, [(network, 1.0)]), replace(CONFIG, rates=rates))
    by_id = {id(p): group["base_lr"] for group in optimizer.param_groups for p in group["params"]}
    found = {name: by_id[id(p)] / 1e-3 for name, p in network.named_parameters()}
    assert found == pytest.approx({"text.weight": 0.0, "text.bias": 2.0, "dit.weight": 1.0, "dit.bias": 0.5})
    before = [p.detach().clone() for p in network["text"].parameters()]
    network["dit"](network["text"](torch.ones(1, 2))).sum().backward()
    optimizer.step()
    assert torch.equal(before[0], network["text"].weight) and not torch.equal(before[1], network["text"].bias)
    check_patterns([Network(network, [(network, 1.0)])], rates)
    with pytest.raises(InputError, match=r"optim.rates: 'vae.\*' is the name of no trained parameter; names are text"):
        check_patterns([Network(network, [(network, 1.0)])], {"vae.*": 0.1})


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


def test_the_rate_may_fall_by_a_cosine_and_to_a_share_of_itself() -> None:
    cosine = replace(CONFIG, schedule="cosine", end_rate=0.1)
    factors = [lr_factor(step, 100, cosine) for step in range(100)]
    assert set(factors[9:51]) == {1.0} and factors[75] == pytest.approx(0.55) and 0.1 < factors[99] < 0.102
    assert factors[60] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.2)))
    assert lr_factor(99, 100, replace(CONFIG, end_rate=0.1)) == pytest.approx(0.1 + 0.9 * 0.02)


@pytest.mark.parametrize(("warmup", "decay", "steps"), [(0, 0.0, 10), (0, 1.0, 1), (50, 0.5, 10)])
def test_the_rate_is_sane_for_odd_settings(warmup: int, decay: float, steps: int) -> None:
    config = OptimConfig(warmup_steps=warmup, decay_fraction=decay)
    assert all(0.0 < lr_factor(step, steps, config) <= 1.0 for step in range(steps))
