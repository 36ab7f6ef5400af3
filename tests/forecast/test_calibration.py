"""Measured cost: the fit finds what made the times, the plan balances by it, and a new fit leaves a run alone."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import DictConfig

from sora_train.config.cost import KEPT, balancing_cost, cost, geometry, keep_cost
from sora_train.config.load import build
from sora_train.config.schema import Config
from sora_train.core.cli import InputError
from sora_train.core.cost import Seconds
from sora_train.data.order.balance import packed
from sora_train.data.shards import Shards
from sora_train.forecast.calibration import TERMS, Measured, as_json, fit, measure, shapes

TRUE = dict(zip(TERMS, (2e-3, 5e-4, 1e-5, 3e-8, 2e-8), strict=True))


@pytest.fixture
def make(compose_tree: Callable[..., DictConfig], tmp_path: Path) -> Callable[..., Config]:
    def config(*overrides: str) -> Config:
        return build(compose_tree("experiment=demo", f"run_dir={tmp_path}/run", *overrides), need_vae=False)

    return config


def _times(config: Config, noise: float = 0.0) -> list[Measured]:
    """What packs would take if the true seconds held, off by up to `noise`."""
    grid, found = geometry(config), []
    for number, sizes in enumerate(shapes(config)):
        tokens, pixels = tuple(grid.tokens(*size) for size in sizes), tuple(map(math.prod, sizes))
        row = Measured(tokens, pixels, 1.0).row
        seconds = sum(TRUE[term] * value for term, value in zip(TERMS, row, strict=True))
        found.append(Measured(tokens, pixels, seconds * (1.0 + noise * math.sin(9.0 * number))))
    return found


def _write(config: Config, path: Path, **changed: float) -> None:
    content = as_json(config, fit(config, _times(config)), "a core")
    content["seconds"] |= changed
    path.write_text(json.dumps(content))


def test_the_fit_finds_what_made_the_times(make: Callable[..., Config]) -> None:
    config = make()
    found = fit(config, _times(config))
    assert found.seconds == pytest.approx(TRUE, rel=1e-4)
    assert max(found.errors) < 1e-6 and np.median(found.flops_errors) > 0.1
    assert np.median(fit(config, _times(config, noise=0.02)).errors) < 0.03


def test_packs_are_of_images_and_clips_alone_and_together(make: Callable[..., Config]) -> None:
    config = make()
    sizes = shapes(config)
    grid, most = geometry(config), config.data
    assert all(sum(grid.tokens(*size) for size in pack) <= most.max_tokens for pack in sizes)
    assert {len(pack) for pack in sizes} >= {1, 16} and {size[0] for pack in sizes for size in pack} >= {1, 9}
    assert max(h * w for pack in sizes for _, h, w in pack) <= most.max_pixels


@pytest.mark.parametrize("latents", [False, True])
def test_packs_are_measured(make: Callable[..., Config], latents: bool) -> None:
    small = ("model.depth=1", "model.width=32", "model.heads=2", "model.ffn=64", "vae.widths=[4,4]", "vae.blocks=[0,0]")
    config = make(*small, "text_encoder.depth=1", "data.max_frames=5", "data.max_pixels=576", "data.max_tokens=48")
    packs = list(measure(config, torch.device("cpu"), 1, latents))
    assert len(packs) == len(shapes(config)) and all(pack.seconds > 0 for pack in packs)
    assert all((sum(pack.pixels) == 0) == latents for pack in packs)


def test_the_plan_balances_by_seconds_and_its_hash_covers_them(
    make: Callable[..., Config], corpus: list[str], tmp_path: Path
) -> None:
    data = (
        f"data.sources.demo.shards=[{','.join(corpus)}]",
        "data.validation=[]",
        "data.slots=2",
        "data.max_tokens=4096",
    )
    by_flops = make(*data)
    shards = Shards(by_flops)
    plans = {"flops": shards.plan(by_flops)}
    for name, per_clip in (("fit", 1e-4), ("clips", 1.0)):
        _write(by_flops, tmp_path / f"{name}.json", per_clip=per_clip)
        plans[name] = shards.plan(make(*data, f"data.cost={tmp_path}/{name}.json"))
    assert len({plan.hash for plan in plans.values()}) == 3
    assert packed(plans["flops"].plans[0]).seconds is None
    clips = [[len(slot) for slot in step] for step in plans["clips"].plans[0].steps(0, 0)]
    assert all(max(step) - min(step) <= 1 for step in clips)  # where a clip costs a second, little else counts
    assert packed(plans["clips"].plans[0]).seconds == pytest.approx(np.mean([max(step) for step in clips]), rel=0.01)


def test_a_new_fit_leaves_a_run_under_way_alone(make: Callable[..., Config], tmp_path: Path) -> None:
    config = make(f"data.cost={tmp_path}/cost.json")
    _write(config, tmp_path / "cost.json")
    first = balancing_cost(config)
    assert first == Seconds(*(pytest.approx(TRUE[term] * 1e15, rel=1e-4) for term in TERMS))  # type: ignore[arg-type]
    (tmp_path / "run").mkdir()
    keep_cost(config)
    _write(config, tmp_path / "cost.json", per_clip=1.0)
    keep_cost(config)
    assert balancing_cost(config) == first
    (tmp_path / "run" / KEPT).unlink()
    assert balancing_cost(config) != first
    config.data.cost = None
    assert balancing_cost(config) == cost(config)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "doesn't exist"),
        ("{", "is no measured cost"),
        ('{"seconds": {"per_pack": 1}, "flops": {}}', "is no measured cost"),
        ("of another model", "was measured with another model"),
        ("negative", "has times below 0"),
    ],
)
def test_wrong_files_are_refused(make: Callable[..., Config], tmp_path: Path, content: str | None, said: str) -> None:
    path = tmp_path / "cost.json"
    config = make(f"data.cost={path}")
    if content == "of another model":
        _write(make("model.width=64"), path)
    elif content == "negative":
        _write(config, path, per_token=-1.0)
    elif content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=said) as caught:
        balancing_cost(config)
    assert "sora_train.calibrate" in str(caught.value) and "\n" not in str(caught.value)
