"""A run says at its start what will not come of it, and previews may be of prompts of one's own."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from omegaconf import DictConfig

from sora_train.config.load import build
from sora_train.config.schema import Config
from sora_train.operations.advice import advice
from sora_train.operations.held_out import PromptClips

Make = Callable[..., Config]


@pytest.fixture
def make(compose_tree: Callable[..., DictConfig]) -> Make:
    def config(*overrides: str) -> Config:
        tree = compose_tree("experiment=demo", "vae.path=nowhere", "data.sources.demo.shards=[x]", *overrides)
        return build(tree, need_vae=False)

    return config


def test_previews_that_will_not_come_are_said(make: Make) -> None:
    (line,) = advice(make("data.validation=[]"))
    assert "no previews" in line and "logging.prompts=" in line
    for silent in (
        "data.validation=[v]",
        "logging.previews=training",
        "logging.sample_every=0",
        "logging.prompts=[a dog]",
    ):
        assert advice(make("data.validation=[]", silent)) == []


def test_prompts_of_ones_own_are_previewed_at_the_size_of_samples(make: Make) -> None:
    config = make("logging.prompts=[a red ring,'two dogs, running']", "data.max_frames=9", "data.max_pixels=1024")
    clips = PromptClips(config).get()
    assert [clip.caption for clip in clips] == ["a red ring", "two dogs, running"]
    assert {clip.visit.size for clip in clips} == {(9, 32, 32)} and len({clip.visit.seed for clip in clips}) == 2


def test_what_released_weights_were_not_trained_for_is_said(make: Make, tmp_path: Path) -> None:
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler/scheduler_config.json").write_text(json.dumps({"flow_shift": 5.0}))
    (tmp_path / "model_index.json").write_text("{}")
    config = make("data.validation=[v]", "flow.shift=2")
    config.flow.tasks = {"text_to_video": 3.0, "image_to_video": 1.0, "extension": 0.0}
    config = replace(config, model=replace(config.model, init_from=str(tmp_path)))
    shift, tasks = advice(config)
    assert "flow.shift=2, and the scheduler" in shift and shift.endswith("flow.shift=5")
    assert (
        "25% of the clips train image_to_video" in tasks
        and "'flow.tasks={text_to_video: 1, image_to_video: 0}'" in tasks
    )
    (tmp_path / "model_index.json").write_text(json.dumps({"expand_timesteps": True}))
    config.flow.shift = 5.0
    assert advice(config) == []
