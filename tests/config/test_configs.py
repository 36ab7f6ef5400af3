"""Every file under conf/ composes, mirrors the dataclasses, can be planned, and takes a real step where it is small."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from torch import nn

from sora_train.config.cost import geometry
from sora_train.config.hydra import CONF
from sora_train.config.load import build, known_keys, to_dict
from sora_train.config.schema import Config, Method, Precision
from sora_train.core.batch import Clip, Pack
from sora_train.core.pixels import to_unit
from sora_train.flow.objective import FlowTask
from sora_train.forecast.estimate import estimate, meta_network
from sora_train.generation.sampler import build_vae, build_video_model, tokenizer
from sora_train.methods.reconstruction import AutoencodingTask
from sora_train.training.parts import Task

Compose = Callable[..., DictConfig]
EXPERIMENTS = sorted(path.stem for path in CONF.glob("experiment/*.yaml"))
OPTIONS = sorted(
    f"{path.parent.name}={path.stem}"
    for path in CONF.glob("*/*.yaml")
    if path.parent.name not in ("experiment", "sweep", "debug")
)
FREE = ("data.sources", "flow.tasks", "deepspeed")  # maps whose keys are the user's


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Away from any trained VAE."""
    monkeypatch.chdir(tmp_path)


def with_shards(tree: DictConfig) -> DictConfig:
    """Name shards where a configuration leaves that to the user."""
    for source in tree.data.sources.values():
        if OmegaConf.is_missing(source, "shards"):
            source.shards = ["my/*.tar"]
    return tree


def meta(config: Config) -> nn.Module:
    if config.method is Method.diffusion:
        return meta_network(build_video_model, config)
    return meta_network(build_vae, config.vae)


def keys(tree: DictConfig, prefix: str = "") -> Iterator[str]:
    for key in tree:
        name = f"{prefix}{key}"
        yield name
        if name not in FREE and not OmegaConf.is_missing(tree, key) and isinstance(tree[key], DictConfig):
            yield from keys(tree[key], f"{name}.")


def test_there_are_configurations_to_test() -> None:
    assert {"demo", "demo_vae", "demo_long"} <= set(EXPERIMENTS)
    assert {"model=14b", "deepspeed=zero3", "data=folder", "vae=base"} <= set(OPTIONS)


@pytest.mark.parametrize("ranks", [1, 64])
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_is_checked_and_planned(compose_tree: Compose, experiment: str, ranks: int) -> None:
    config = build(with_shards(compose_tree(f"experiment={experiment}")), need_vae=False)
    figures = estimate(config, meta(config), None, ranks)
    assert figures.parameters == sum(p.numel() for p in meta(config).parameters()) > 100_000
    assert figures.state_bytes > 0 and figures.activation_bytes > 0 and figures.step_flops > 0
    assert figures.passes == math.ceil(config.data.slots / ranks)
    assert figures.idle == pytest.approx(1 - config.data.slots / (figures.passes * ranks))
    assert config.data.max_tokens >= config.data.max_pixels // geometry(config).multiple ** 2


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_of_every_group_composes_into_a_valid_configuration(compose_tree: Compose, option: str) -> None:
    config = build(with_shards(compose_tree("experiment=demo", option)), need_vae=False)
    assert estimate(config, meta(config), None, 8).state_bytes > 0


@pytest.mark.parametrize(
    ("model", "low", "high"),
    [("demo", 1e6, 4e6), ("20m", 18e6, 28e6), ("100m", 90e6, 120e6), ("1b3", 1.2e9, 1.6e9), ("14b", 13e9, 15e9)],
)
def test_models_have_the_size_of_their_name(compose_tree: Compose, model: str, low: float, high: float) -> None:
    config = build(compose_tree("experiment=demo", f"model={model}"), need_vae=False)
    assert low < sum(p.numel() for p in meta_network(build_video_model, config).parameters()) < high


def test_memory_per_rank_follows_the_zero_stage(compose_tree: Compose) -> None:
    config = build(compose_tree("experiment=demo", "precision=bf16"), need_vae=False)
    network = meta(config)

    def state(stage: int, ranks: int) -> int:
        config.deepspeed = {"zero_optimization": {"stage": stage}}
        return estimate(config, network, None, ranks).state_bytes

    assert [state(stage, 1) / state(0, 1) for stage in (1, 2, 3)] == pytest.approx([1.0, 1.0, 1.0])
    assert state(0, 64) == state(0, 1)
    assert state(0, 64) > state(1, 64) > state(2, 64) > state(3, 64)
    assert state(3, 64) == pytest.approx(state(3, 1) / 64, rel=1e-3)


def test_every_key_of_the_dataclasses_stands_in_conf_and_every_key_of_conf_in_the_dataclasses(
    compose_tree: Compose,
) -> None:
    """A key that isn't in conf/ could not be set on the command line."""
    dataclasses = {key for key in known_keys() if not key.startswith(tuple(f"{free}." for free in FREE))}
    for option in OPTIONS:  # no key but its own section's depends on it
        section = option.split("=")[0]
        if section in FREE:
            continue
        found = set(keys(compose_tree(option)[section], f"{section}."))
        assert found == {key for key in dataclasses if key.startswith(f"{section}.")}, option
    assert set(compose_tree()) == {key for key in dataclasses if "." not in key}


def test_conf_has_a_group_for_every_section_and_no_other(compose_tree: Compose) -> None:
    sections = {key for key, value in to_dict(Config(run_dir="x", steps=1)).items() if isinstance(value, dict)}
    assert {path.name for path in CONF.iterdir() if path.is_dir()} == sections | {"experiment", "sweep", "debug"}
    defaults = OmegaConf.load(CONF / "train.yaml").defaults
    chosen = {str(key): value for entry in defaults if isinstance(entry, DictConfig) for key, value in entry.items()}
    assert {key for key in chosen if not key.startswith("override")} == sections | {"experiment", "sweep", "debug"}
    assert all((CONF / group / f"{chosen[group]}.yaml").is_file() for group in sections)


def test_the_configuration_of_a_run_can_be_read_back(compose_tree: Compose) -> None:
    config = build(compose_tree("experiment=demo"), need_vae=False)
    assert build(OmegaConf.create(to_dict(config)), need_vae=False) == config


def test_a_sweep_composes() -> None:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        overrides = ["run_dir=x", "experiment=demo", "sweep=lr"]
        tree = compose("train", overrides=overrides, return_hydra_config=True)
    assert tree.hydra.sweeper.params == {"optim.lr": "1.0e-3,2.0e-3,4.0e-3"}


def real(config: Config) -> tuple[nn.Module, Task]:
    """Network and task as a run makes them, but for a VAE that isn't trained."""
    torch.manual_seed(0)
    vae = build_vae(config.vae)
    if config.method is Method.autoencoder:
        return vae, AutoencodingTask(config.vae, geometry(config))

    @torch.no_grad()
    def encode(video: torch.Tensor) -> torch.Tensor:
        return vae.normalise(vae.encode(to_unit(video))[0])

    task = FlowTask(config.flow, geometry(config), config.vae.channels, encode, tokenizer(config))
    return build_video_model(config), task


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_small_experiment_takes_a_real_step(
    compose_tree: Compose, make_clip: Callable[..., Clip], experiment: str
) -> None:
    config = build(with_shards(compose_tree(f"experiment={experiment}")), need_vae=False)
    if sum(p.numel() for p in meta(config).parameters()) > 200_000_000:
        pytest.skip("too large to build in a test")
    network, task = real(config)
    grid = geometry(config)
    side, frames = 2 * grid.multiple, 1 + grid.temporal_stride
    clips = [make_clip((1, side, 2 * side), 1, "image"), make_clip((frames, side, side), 2, "text_to_video")]
    pack = Pack(clips)
    dtype = torch.bfloat16 if config.precision is Precision.bf16 else torch.float32
    loss = task.loss(network.to(dtype), pack, torch.device("cpu"))
    loss.sum.backward()
    mean = loss.sum.item() / task.weight(pack)
    assert 0.01 < mean < 10.0
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    assert all(g.isfinite().all() for g in gradients) and any(g.any() for g in gradients)
