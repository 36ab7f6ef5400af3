"""The recipes at real scale: their figures are those of `plan`, they fit, their stages go together, and ranks start."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra

from benchmarks.recipes import TABLE, configured, planned, plans
from sora_train.config.hydra import CONF
from sora_train.config.registry import METHODS
from sora_train.config.schema import Config
from sora_train.methods.base import trained
from tests.documented import ROOT

PLANS = plans()
QUICK = ("vae_16_decoder", "wan22_5b_lora")  # one of each kind; the others in the campaign
HEAD = ("command", "hardware", "plan", "planned", "sources", "result")
SMALL = (
    "model.width=64", "model.depth=2", "model.heads=8", "model.ffn=64", "vae.widths=[8,8,8]", "vae.blocks=[1,1,1]",
    "text_encoder.width=16", "text_encoder.pad_to=0", "data.max_frames=5", "data.max_pixels=4096", "data.stages=[]",
    "vae.perceptual.weight=0",
)  # fmt: skip


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Away from any weights."""
    GlobalHydra.instance().clear()
    monkeypatch.chdir(tmp_path)


def head(name: str) -> str:
    return (CONF / "experiment" / f"{name}.yaml").read_text()


def test_every_kind_of_recipe_is_there() -> None:
    kinds = ("scratch_1b3", "scratch_5b", "wan21_1b3", "wan21_14b", "wan22_5b", "vae_16", "vae_16_decoder")
    assert all(any(name.startswith(kind) for name in PLANS) for kind in kinds)
    assert {"wan21_1b3_lora", "wan21_14b_lora", "wan22_5b_lora", *QUICK} <= set(PLANS)


@pytest.mark.parametrize("name", PLANS)
def test_the_head_says_what_it_takes(name: str) -> None:
    for part in HEAD:
        assert re.search(rf"^#   {part}: +\S", head(name), re.M), part
    assert f"experiment={name} " in PLANS[name] and f" run_dir=runs/{name} " in head(name)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.campaign) for name in PLANS]
)
def test_the_figures_are_those_of_the_plan(name: str) -> None:
    """A change of the model, of the configuration or of the forecast shows here: python -m benchmarks.recipes."""
    recipe = planned(name, *configured(PLANS[name]))
    assert recipe.fits
    assert f"#   planned:  {recipe.line()}\n" in head(name)
    assert f"| {' | '.join(recipe.row())} |\n" in TABLE.read_text()


@pytest.mark.parametrize("name", PLANS)
def test_no_gpu_idles_and_the_longest_clip_fits(name: str) -> None:
    config, o = configured(PLANS[name])
    groups, method = o.world_size // config.parallel.sequence, METHODS.get(config.method)
    assert config.data.slots % groups == 0
    geometry = method.geometry(config)
    tokens = geometry.grid(config.data.max_frames, 1, 1)[0] * config.data.max_pixels // geometry.multiple**2
    assert config.data.max_tokens % tokens < 0.1 * config.data.max_tokens, "the longest clips leave little room"
    assert tokens <= config.data.max_tokens


def shapes(config: Config) -> dict[str, torch.Size]:
    with torch.device("meta"):
        _, network = next(trained(METHODS.get(config.method).planned(config).networks))
    return {name: p.shape for name, p in network.module.named_parameters()}


@pytest.mark.parametrize("name", [name for name in PLANS if "init_from: runs/" in head(name)])
def test_a_stage_starts_from_the_weights_of_the_one_before(name: str) -> None:
    config, _ = configured(PLANS[name])
    assert config.init_from is not None
    before, _ = configured(PLANS[config.init_from.removeprefix("runs/")])
    assert (before.method, before.vae, before.text_encoder) == (config.method, config.vae, config.text_encoder)
    assert shapes(before) == shapes(config)
    assert before.data.max_pixels * before.data.max_frames < config.data.max_pixels * config.data.max_frames


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "names", [pytest.param(QUICK, id="some"), pytest.param(tuple(PLANS), id="all", marks=pytest.mark.campaign)]
)
def test_a_rank_of_each_takes_a_step_at_its_world_size(python: str, names: tuple[str, ...]) -> None:
    """Under the recipe's ZeRO engine, among as many ranks, with a small network and small clips in its place."""
    script = f"""
from benchmarks.recipes import configured, plans
from sora_train.forecast.estimate import passes_per_rank
from sora_train.forecast.footprint import stage_of
from sora_train.forecast.rehearsal import rehearse
for name in {names}:
    arguments = plans()[name]
    keys = " ".join({SMALL!r}) if "vae_16" not in name else " ".join({SMALL[4:6] + SMALL[8:]!r})
    config, o = configured(arguments + " " + keys)
    took = rehearse(config, o.world_size, passes_per_rank(config, o.world_size), [(5, 64, 64), (1, 64, 64)])
    print("rank of", name, stage_of(config), o.world_size, took.parameters, took.owned, flush=True)
"""
    done = subprocess.run([python, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=880)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line.split()[2:] for line in done.stdout.splitlines() if line.startswith("rank of")]
    assert [row[0] for row in rows] == list(names)
    for name, stage, ranks, parameters, owned in rows:
        assert 0 < int(owned) <= int(parameters) / (int(ranks) if int(stage) else 1) * 1.6 + 1000, name
