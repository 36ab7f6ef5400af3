"""What a configuration cuts off is said with its share: nothing is shortened without a word."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import DictConfig

from sora_train.config.load import build
from sora_train.config.schema import Config
from sora_train.data.index.index import load_index
from sora_train.data.index.make import index_shards
from sora_train.data.left_out import cut_captions, left_out, shortened_clips
from sora_train.data.order.curriculum import Stages
from sora_train.data.order.plan import Plan
from sora_train.data.shards import plan_inputs
from sora_train.encoding.captions import count_tokens

Compose = Callable[..., DictConfig]


@pytest.fixture
def config(compose_tree: Compose, corpus: list[str]) -> Config:
    config = build(compose_tree("experiment=demo"), need_vae=False)
    config.data.max_pixels, config.data.max_frames, config.data.fps = 4096, 33, 8.0
    return config


def test_clips_that_max_tokens_shortens_are_counted(config: Config, corpus: list[str]) -> None:
    index, rows = load_index(corpus), np.arange(24)
    inputs = plan_inputs(config, [""] * 3, {"text_to_video": 1.0})
    frames = inputs.cuts(index, rows).frames
    assert shortened_clips(inputs, index, rows) == ""
    least = int(inputs.cuts(index, rows).per_frame.max())
    line = shortened_clips(replace(inputs, max_tokens=2 * least), index, rows)
    stride = inputs.geometry.temporal_stride
    short = int((frames > 1 + stride).sum())
    assert f"data.max_tokens={2 * least} shortens {short} of 24 of the clips" in line and short
    assert f"to {1 + stride} of {frames.max()} frames" in line
    enough = int(line.split("frames; ")[1].split()[0])
    assert shortened_clips(replace(inputs, max_tokens=enough), index, rows) == ""
    assert shortened_clips(replace(inputs, max_tokens=enough - 1), index, rows)


def test_captions_longer_than_the_encoder_takes_are_counted(
    config: Config, tmp_path: Path, write_samples: Callable[..., str], make_sample: Callable[[int], dict[str, Any]]
) -> None:
    png = make_sample(0)["png"]
    captions = ["word " * 20, "word " * 3, "a" * 60, "word " * 9]
    samples = [{"__key__": str(n), "png": png, "txt": text.encode()} for n, text in enumerate(captions)]
    shard = write_samples(tmp_path / "s.tar", samples)
    index_shards([shard], workers=1)
    index = load_index([shard])
    count = partial(count_tokens, config)
    assert count_tokens(config, captions) == [21, 4, 2, 10], "the start token counts"
    line = cut_captions(10, index, np.arange(4), count)
    assert line.startswith(
        "warning: 1 of 4 of the samples have captions of more than text_encoder.max_tokens=10 tokens"
    )
    assert "has 21)" in line
    assert cut_captions(21, index, np.arange(4), count) == ""
    config.text_encoder.max_tokens = 10
    plan = Stages([Plan(index, plan_inputs(config, [""], {"text_to_video": 1.0}))], [])
    assert left_out(config, plan, count) == [line]
