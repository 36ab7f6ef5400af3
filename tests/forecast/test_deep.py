"""A deep model's trace from two shallow ones is that of the whole model; and a forecast reads no released files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from omegaconf import DictConfig

from sora_train.config.load import absent, build
from sora_train.forecast.deep import deep_trace
from sora_train.forecast.trace import trace

Compose = Callable[..., DictConfig]
WAN = (
    "experiment=demo", "model=1b3", "vae=base", "vae.path=nowhere", "text_encoder.path=nowhere", "precision=bf16",
    "model.width=64", "model.heads=4", "model.ffn=128", "flow.prediction=velocity", "optim.matrices=adamw",
)  # fmt: skip
CASES = {
    "text encoder of our own, nothing recomputed": (("experiment=demo", "precision=bf16"), [(9, 48, 48)] * 2),
    "released, recomputed, adapters": ((*WAN, "model.lora.rank=4"), [(5, 64, 64)]),
    "shared by two ranks": ((*WAN, "parallel.sequence=2"), [(5, 64, 64), (1, 64, 64)]),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if "shared" in n else pytest.mark.campaign) for n in CASES])
def test_it_is_that_of_the_whole_model(compose_tree: Compose, name: str) -> None:
    keys, sizes = CASES[name]
    config = build(compose_tree(*keys, "model.depth=4"), need_vae=False)
    whole, deep = (make(config, sizes, encoded=True) for make in (trace, deep_trace))
    assert (deep.activations, deep.made, deep.flops) == (whole.activations, whole.made, whole.flops)
    assert (deep.modules, deep.exchanged, deep.encoder) == (whole.modules, whole.exchanged, whole.encoder)
    assert len(deep.operations) == len(whole.operations)
    moved = [sum(operation.bytes for operation in t.operations) for t in (deep, whole)]
    assert moved[0] == pytest.approx(moved[1], rel=1e-3)


def test_clips_that_come_encoded_need_no_encoder(compose_tree: Compose) -> None:
    config = build(compose_tree("experiment=demo", "model.depth=1"), need_vae=False)
    encoding, without = (trace(config, [(9, 48, 48)], encoded) for encoded in (False, True))
    assert any(o.kind == "convolution" for o in encoding.operations)
    assert not any(o.kind == "convolution" for o in without.operations)
    assert without.encoder < encoding.encoder and without.activations == encoding.activations
    assert without.encoder_weights == encoding.encoder_weights  # it is there for previews


def test_a_forecast_needs_no_released_folder(compose_tree: Compose) -> None:
    keys = ("model.init_from", "vae.path", "text_encoder.path")
    tree = compose_tree(*WAN, "model.depth=1", *(f"{key}=nowhere" for key in keys))
    config = build(tree, need_vae=False)
    assert absent(config) == ["vae.path", "text_encoder.path", "model.init_from"]
    padded, short = (replace(config, text_encoder=replace(config.text_encoder, pad_to=n)) for n in (512, 0))
    assert trace(padded, [(5, 64, 64)], True).flops > 1.05 * trace(short, [(5, 64, 64)], True).flops
    assert not Path("nowhere").exists()
