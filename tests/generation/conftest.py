"""A small model on a VAE of stride 2, and a run folder of it."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import save_file

from sora_train.config.hydra import CONF
from sora_train.config.load import build, load, to_yaml
from sora_train.config.schema import VAE_USE, Config, VaeConfig
from sora_train.models.video_model import build_video_model
from sora_train.models.video_vae.model import build_vae
from sora_train.training.state.checkpoint import Checkpoints

SMALL = ("model.width=32", "model.depth=1", "model.heads=2", "model.ffn=32", "text_encoder.width=16")


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, process_group: torch.device) -> Path:
    """The model's VAE in `vae`, and in `run` a run with two checkpoints of random weights, averages unlike trained."""
    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    vae = VaeConfig(widths=[8, 8], blocks=[0, 1], channels=4, strides=[[2, 1]], patch=4)
    (folder / "vae").mkdir()
    save_file(build_vae(vae).state_dict(), folder / "vae" / "vae.safetensors")
    shape = {key: value for key, value in asdict(vae).items() if key not in VAE_USE}
    (folder / "vae" / "config.json").write_text(json.dumps(shape))
    here = (f"vae.path={folder}/vae", "run_dir=run", "data.max_pixels=576", "flow.sampling_steps=1")
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        config = build(compose("train", overrides=["experiment=demo", *SMALL, *here]))
    (folder / "run").mkdir()
    (folder / "run" / "config.yaml").write_text(to_yaml(config).replace(f"{folder}/vae", "vae"))
    network = build_video_model(config)
    checkpoints = Checkpoints(folder / "run" / "checkpoints", keep=2)
    for step in (1, 2):
        torch.manual_seed(step)
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        named = {f"model/{name}": p.detach().clone() for name, p in network.named_parameters()}
        pieces = {f"ema/{name}": (0, p.reshape(-1)) for name, p in named.items()}
        pieces |= {f"master/{name}": (0, 1.5 * p.reshape(-1)) for name, p in named.items()}
        checkpoints.save(step, pieces, {"step": step, "shapes": {name: tuple(p.shape) for name, p in named.items()}})
        assert checkpoints.wait()
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy of that run and VAE that a test may change."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture
def config(folder: Path) -> Config:
    """The configuration of that run."""
    return load(folder / "run")


@pytest.fixture
def sample(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Give the command's options beside run_dir, in a folder of its own."""
    from sora_train import sample

    monkeypatch.chdir(folder)

    def give(*arguments: str) -> None:
        its = [] if any(a.startswith(("run_dir=", "from=")) for a in arguments) else ["run_dir=run"]
        monkeypatch.setattr(sys, "argv", ["sample", *its, *arguments])
        assert sample.main() == 0

    return give
