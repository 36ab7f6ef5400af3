"""A small model on a VAE of stride 2, and a run folder of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig
from safetensors.torch import save_file

from sora_train.config.load import build
from sora_train.config.schema import VAE_USE, Config, VaeConfig
from sora_train.generation.sampler import build_vae

SMALL = ("model.width=32", "model.depth=1", "model.heads=2", "model.ffn=32", "text_encoder.width=16")


@pytest.fixture
def config(compose_tree: Callable[..., DictConfig], tmp_path: Path) -> Config:
    """A small model on a VAE of stride 2."""
    torch.manual_seed(0)
    vae = VaeConfig(widths=[8, 8], blocks=[0, 1], channels=4, strides=[[2, 1]])
    (tmp_path / "vae").mkdir()
    save_file(build_vae(vae).state_dict(), tmp_path / "vae" / "vae.safetensors")
    shape = {key: value for key, value in asdict(vae).items() if key not in VAE_USE}
    (tmp_path / "vae" / "config.json").write_text(json.dumps(shape))
    here = (f"vae.path={tmp_path}/vae", f"run_dir={tmp_path}/run", "data.max_pixels=256", "flow.sampling_steps=1")
    return build(compose_tree("experiment=demo", *SMALL, *here))
