"""Training of the decoder alone: encoder, latents and their statistics stay bit for bit, and the loss falls."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig
from safetensors.torch import load_file, save_file

from sora_train import export
from sora_train.config.cost import training_cost
from sora_train.config.load import build, to_yaml
from sora_train.config.schema import VAE_USE, Config, VaeConfig
from sora_train.core.batch import Clip, Pack
from sora_train.core.cli import InputError
from sora_train.methods.autoencoder.learner import AutoencoderLearner, start
from sora_train.models.video_vae.model import build_vae
from sora_train.training.engine.optim import optimizer_of

CPU = torch.device("cpu")
SHAPE = VaeConfig(channels=4, patch=4, widths=[16, 16], blocks=[0, 1], strides=[[4, 1]])


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """An exported VAE with statistics of its own."""
    torch.manual_seed(3)
    vae, folder = build_vae(SHAPE), tmp_path / "vae"
    vae.latents_mean.fill_(0.25)
    vae.latents_std.fill_(3.0)
    folder.mkdir()
    save_file(vae.state_dict(), folder / "vae.safetensors")
    shape = {key: value for key, value in asdict(SHAPE).items() if key not in VAE_USE}
    (folder / "config.json").write_text(json.dumps(shape))
    return folder


@pytest.fixture
def config(compose_tree: Callable[..., DictConfig], exported: Path) -> Config:
    keys = ("experiment=demo_vae", f"vae.path={exported}", "vae.frozen_encoder=true", "optim.lr=1e-2",
            "optim.matrices=adamw")  # fmt: skip
    return build(compose_tree(*keys))


def train(learner: AutoencoderLearner, config: Config, pack: Pack, steps: int) -> list[float]:
    network = learner.networks["vae"]
    optimizer = optimizer_of(network, config.optim)
    losses = []
    for _ in range(steps):
        loss = learner.loss(network.module, pack).sum / learner.weight(pack)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_the_decoder_learns_and_the_latents_stay(
    config: Config, exported: Path, make_clip: Callable[..., Clip], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, learner = load_file(exported / "vae.safetensors"), start(config, CPU)
    losses = train(learner, config, Pack([make_clip((5, 16, 16), 1), make_clip((1, 16, 16), 2, "image")]), 20)
    assert losses[-1] < 0.8 * losses[0]
    module = learner.networks["vae"].module
    trained = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
    assert trained and all(name.startswith("decoder.") for name in trained), "all that a checkpoint holds"

    run, out = tmp_path / "run", tmp_path / "out"
    run.mkdir()
    (run / "config.yaml").write_text(to_yaml(config))
    monkeypatch.setattr(export, "trained_weights", lambda _: trained)
    monkeypatch.setattr(sys, "argv", ["export", f"run_dir={run}", f"out={out}"])
    assert export.main() == 0
    after = load_file(out / "vae.safetensors")
    assert after.keys() == before.keys()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == {name for name in trained if not torch.equal(trained[name], before[name])} != set()
    assert json.loads((out / "config.json").read_text()) == json.loads((exported / "config.json").read_text())


def test_a_frozen_encoder_has_no_backward_pass(config: Config) -> None:
    whole = replace(config, vae=replace(config.vae, frozen_encoder=False))
    assert training_cost(config).training([100]) * 3 == training_cost(whole).training([100]) * 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("vae.path=null",), "give its folder: vae.path"),
        (("init_from=runs/other",), "leave out init_from=runs/other"),
        (("experiment=demo", "optim.matrices=adamw"), "vae.frozen_encoder is for method=autoencoder"),
    ],
)
def test_what_does_not_go_with_it_is_refused(
    compose_tree: Callable[..., DictConfig], exported: Path, overrides: tuple[str, ...], message: str
) -> None:
    experiment = () if overrides[0].startswith("experiment") else ("experiment=demo_vae",)
    with pytest.raises(InputError, match=message):
        build(compose_tree(*experiment, f"vae.path={exported}", "vae.frozen_encoder=true", *overrides))
