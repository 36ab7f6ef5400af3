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

from sora_train.config.cost import geometry
from sora_train.config.hydra import CONF
from sora_train.config.load import build, known_keys, schema_of, to_dict
from sora_train.config.registry import METHODS
from sora_train.core.batch import Clip, Pack
from sora_train.forecast.estimate import estimate
from sora_train.methods.base import trained

Compose = Callable[..., DictConfig]
EXPERIMENTS = sorted(path.stem for path in CONF.glob("experiment/*.yaml"))
OPTIONS = sorted(
    f"{path.parent.name}={path.stem}"
    for path in CONF.glob("*/*.yaml")
    if path.parent.name not in ("experiment", "sweep", "debug")
)
FREE = ("data.sources", "flow.tasks", "deepspeed", "method_options")  # maps whose keys are the user's


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


def keys(tree: DictConfig, prefix: str = "") -> Iterator[str]:
    for key in tree:
        name = f"{prefix}{key}"
        yield name
        if name not in FREE and not OmegaConf.is_missing(tree, key) and isinstance(tree[key], DictConfig):
            yield from keys(tree[key], f"{name}.")


def test_there_are_configurations_to_test() -> None:
    assert {"demo", "demo_vae", "demo_long"} <= set(EXPERIMENTS)
    assert {"model=14b", "deepspeed=zero3", "data=folder", "vae=demo"} <= set(OPTIONS)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_is_checked_and_planned(compose_tree: Compose, experiment: str) -> None:
    config = build(with_shards(compose_tree(f"experiment={experiment}")), need_vae=False)
    for ranks in (1, 64):
        figures = estimate(config, None, ranks)
        assert figures.parameters > 100_000 and figures.step_flops > 0
        assert figures.passes == math.ceil(config.data.slots / ranks)
        assert figures.idle == pytest.approx(1 - config.data.slots / (figures.passes * ranks))
    assert config.data.max_tokens >= config.data.max_pixels // geometry(config).multiple ** 2


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_of_every_group_composes_into_a_valid_configuration(compose_tree: Compose, option: str) -> None:
    config = build(with_shards(compose_tree("experiment=demo", option)), need_vae=False)
    assert estimate(config, None, 8).parameters > 0


@pytest.mark.parametrize(
    ("model", "low", "high"),
    [("demo", 1e6, 4e6), ("20m", 18e6, 28e6), ("100m", 90e6, 120e6), ("1b3", 1.2e9, 1.6e9), ("14b", 13e9, 15e9)],
)
def test_models_have_the_size_of_their_name(compose_tree: Compose, model: str, low: float, high: float) -> None:
    config = build(compose_tree("experiment=demo", f"model={model}"), need_vae=False)
    assert low < estimate(config, None, 1).parameters < high


def test_every_key_of_the_dataclasses_can_be_set_on_the_command_line(compose_tree: Compose) -> None:
    tree = compose_tree("experiment=demo")
    composed = {key for key in keys(tree) if not key.startswith(tuple(f"{free}." for free in FREE))}
    assert composed == {key for key in known_keys() if not key.startswith(tuple(f"{free}." for free in FREE))}


def test_no_key_of_a_file_has_the_value_that_it_would_have_without_the_file(compose_tree: Compose) -> None:
    """Each default stands once, in the schema."""
    idle = []
    for option in (*OPTIONS, *(f"experiment={name}" for name in EXPERIMENTS)):
        group, name = option.split("=")
        path = CONF / group / f"{name}.yaml"
        if not path.is_file():
            continue
        file = OmegaConf.load(path)
        file.pop("defaults", None)
        if group == "experiment":
            base = [entry for entry in OmegaConf.load(path).get("defaults", []) if isinstance(entry, str)]
            chosen = [f"{key.split('/')[-1]}={value}" for entry in OmegaConf.load(path).get("defaults", [])
                      if isinstance(entry, DictConfig) for key, value in entry.items()]  # fmt: skip
            without = compose_tree(*(f"experiment={name}" for name in base), *chosen)
        else:
            without = OmegaConf.create({group: schema_of(OmegaConf.create())[group]})
            file = OmegaConf.create({group: file})
        for key, value in leaves(file):
            default = OmegaConf.select(without, key, throw_on_missing=False, default=ABSENT)
            if as_text(default) == as_text(value):
                idle.append(f"{option}: {key} = {value}")
    assert not idle, "\n".join(idle)


ABSENT = object()


def leaves(tree: DictConfig, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key in tree:
        if OmegaConf.is_missing(tree, key):
            continue
        if isinstance(tree[key], DictConfig) and tree[key]:
            yield from leaves(tree[key], f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", tree[key]


def as_text(value: object) -> str:
    plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    return str(getattr(plain, "value", plain))


def test_the_configuration_of_a_run_can_be_read_back(compose_tree: Compose) -> None:
    config = build(compose_tree("experiment=demo"), need_vae=False)
    assert build(OmegaConf.create(to_dict(config)), need_vae=False) == config


def test_a_sweep_composes() -> None:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        overrides = ["run_dir=x", "experiment=demo", "sweep=lr"]
        tree = compose("train", overrides=overrides, return_hydra_config=True)
    assert tree.hydra.sweeper.params == {"optim.lr": "1.0e-3,2.0e-3,4.0e-3"}


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_small_experiment_takes_a_real_step(
    compose_tree: Compose, make_clip: Callable[..., Clip], experiment: str
) -> None:
    config = build(with_shards(compose_tree(f"experiment={experiment}")), need_vae=False)
    if estimate(config, None, 1).parameters > 200_000_000:
        pytest.skip("too large to build in a test")
    torch.manual_seed(0)
    learner = METHODS.get(config.method).planned(config)
    _, trains = next(trained(learner.networks))
    grid = geometry(config)
    side, frames = 2 * grid.multiple, 1 + grid.temporal_stride
    clips = [make_clip((1, side, 2 * side), 1, "image"), make_clip((frames, side, side), 2, "text_to_video")]
    pack = Pack(clips)
    loss = learner.loss(trains.module, pack)
    loss.sum.backward()
    mean = loss.sum.item() / learner.weight(pack)
    assert 0.01 < mean < 10.0
    gradients = [p.grad for p in trains.module.parameters() if p.grad is not None]
    assert all(g.isfinite().all() for g in gradients) and any(g.any() for g in gradients)
