"""Runs that train adapters alone, on two ranks: alike at every ZeRO stage, small checkpoints, resumed to the bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

LAYERS = (
    "blocks.0.cross_attention.q", "blocks.0.cross_attention.v", "blocks.0.mlp.2", "blocks.0.self_attention.q",
    "blocks.0.self_attention.v", "out.project", "text_in.0",
)  # fmt: skip


@pytest.mark.timeout(3600)  # a quarter of a minute, but not on a busy machine
@pytest.mark.parametrize(
    ("kind", "stages", "in_bf16", "steps"),
    [("adapters", (0, 3), (), 2), pytest.param("all adapters", (0, 1, 2, 3), (0, 3), 4, marks=pytest.mark.campaign)],
)
def test_adapters_train_alike_at_every_stage_and_resume(
    runs: Callable[[str], Any], kind: str, stages: tuple[int, ...], in_bf16: tuple[int, ...], steps: int
) -> None:
    found = runs(kind)
    assert found["resumed and undisturbed differ in"] == []
    adapters = [f"dit.{layer}.lora_{part}.default.weight" for layer in LAYERS for part in "AB"]
    every = found["runs"]
    assert len(every) == len(stages) + len(in_bf16) + 1
    for name, run in every.items():
        assert set(map(tuple, run["tensors"].values())) == {tuple(adapters)}, name
        assert run["moved"] > 1e-3, name
        assert len(set(run["losses"].values())) == steps, name
    for stage in stages[1:]:
        assert every[f"stage-{stage}"]["losses"] == pytest.approx(every["stage-0"]["losses"], rel=1e-5), stage
    for stage in in_bf16:
        assert every[f"bf16-{stage}"]["losses"] == pytest.approx(every["stage-0"]["losses"], rel=0.05)
        assert every[f"bf16-{stage}"]["moved"] == pytest.approx(every["stage-0"]["moved"], rel=0.05)
