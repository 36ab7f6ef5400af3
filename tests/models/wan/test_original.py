"""Checkpoints in the layout of Wan's own repository, in and out: a folder, or one file of ComfyUI or torch.save."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from omegaconf import DictConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from sora_train import export
from sora_train.config.load import build, load, to_yaml
from sora_train.config.released import expands_timesteps
from sora_train.core.cli import InputError
from sora_train.data.read.encoded import weights_hash
from sora_train.models.video_model import starting_model
from sora_train.models.wan.convert import load_wan, save_wan
from sora_train.models.wan.model import DiT
from sora_train.models.wan.released import transformer_shape
from sora_train.models.wan.settings import WanConfig

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random transformer in the layout of diffusers, with heads of 128 channels as all of Wan's have."""
    folder = tmp_path_factory.mktemp("diffusers")
    torch.manual_seed(0)
    wan = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=128, in_channels=4, out_channels=4, text_dim=20, freq_dim=16,
        ffn_dim=40, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip
    with torch.no_grad():
        for p in wan.parameters():
            p.add_(0.1 * torch.randn_like(p))
    wan.save_pretrained(folder)
    return folder


def read(path: Path) -> DiT:
    s = transformer_shape(path)
    dit = DiT(
        s["channels"] * 4, s["width"], s["depth"], s["heads"], s["ffn"], s["text_width"], frequencies=s["frequencies"]
    )
    load_wan(dit, path)
    return dit


def write(dit: DiT, folder: Path, shard_gib: float = 10.0) -> None:
    weights: dict[str, Tensor] = {name: p.detach() for name, p in dit.named_parameters()}
    shape = WanConfig(
        width=256, depth=2, heads=2, ffn=40, frequencies=16, absolute_positions=False, pooled_text=False,
        rope_theta=10000.0,
    )  # fmt: skip
    save_wan(weights, shape, 20, folder, shard_gib, layout="original")


@pytest.fixture(scope="module")
def original(theirs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    write(read(theirs), folder)
    return folder


def test_what_is_written_is_what_diffusers_takes_for_wans_own(theirs: Path, original: Path) -> None:
    converted = convert_wan_transformer_to_diffusers(load_file(original / WEIGHTS))
    expected = load_file(theirs / WEIGHTS)
    assert converted.keys() == expected.keys()
    assert all(torch.equal(converted[name], expected[name]) for name in expected)
    settings = json.loads((original / "config.json").read_text())
    assert settings["_class_name"] == "WanModel" and settings["model_type"] == "t2v" and settings["dim"] == 256


def test_a_folder_and_files_of_every_kind_give_the_same_network(theirs: Path, original: Path, tmp_path: Path) -> None:
    expected, weights = read(theirs).state_dict(), load_file(original / WEIGHTS)
    save_file(
        {f"model.diffusion_model.{name}": tensor for name, tensor in weights.items()}, tmp_path / "comfy.safetensors"
    )
    save_file(weights, tmp_path / "plain.safetensors")
    torch.save(weights, tmp_path / "wan.pth")
    write(read(theirs), tmp_path / "parts", shard_gib=1e-4)
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    for path in (
        original,
        *(tmp_path / name for name in ("comfy.safetensors", "plain.safetensors", "wan.pth", "parts")),
    ):
        assert transformer_shape(path) == transformer_shape(theirs)
        found = read(path).state_dict()
        assert all(torch.equal(found[name], expected[name]) for name in expected), path
    assert weights_hash(tmp_path / "wan.pth") != weights_hash(tmp_path / "plain.safetensors")


def test_given_frames_are_known_by_the_kind_of_model(original: Path, tmp_path: Path) -> None:
    settings = json.loads((original / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"model_type": "ti2v"}))
    assert expands_timesteps(tmp_path) and not expands_timesteps(original)


def test_what_is_not_a_transformer_of_one_half_is_one_line(original: Path, tmp_path: Path) -> None:
    weights = load_file(original / WEIGHTS)
    save_file({"decoder.conv.weight": torch.zeros(3)}, tmp_path / "vae.safetensors")
    save_file({**weights, "img_emb.proj.0.weight": torch.zeros(3)}, tmp_path / "i2v.safetensors")
    save_file({**weights, "patch_embedding.weight": torch.zeros(256, 9, 1, 2, 2)}, tmp_path / "inpaint.safetensors")
    save_file(
        {name: w for name, w in weights.items() if "blocks.1" not in name or "ffn" in name}, tmp_path / "l.safetensors"
    )
    (tmp_path / "cut.safetensors").write_bytes((original / WEIGHTS).read_bytes()[:5000])
    (tmp_path / "cut.pth").write_bytes(b"PK\3\4 and nothing")
    torch.save({"step": 3, "model": weights}, tmp_path / "trainer.pth")
    torch.save(Path("x"), tmp_path / "code.pth")
    (tmp_path / "a14b" / "high_noise_model").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text((original / "config.json").read_text())
    for name, said in (
        ("vae.safetensors", "is no Wan transformer in the names of its own repository"),
        ("i2v.safetensors", "has img_emb, which our transformer doesn't know"),
        ("inpaint.safetensors", "takes 9 channels and gives 4"),
        ("l.safetensors", "misses .* tensor"), ("cut.safetensors", "fetch it again"), ("cut.pth", "fetch it again"),
        ("trainer.pth", "save the transformer's state_dict alone"), ("code.pth", "fetch it again"),
        ("a14b", "has two transformers"), ("empty", "has no diffusion_pytorch_model"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=said) as error:
            read(tmp_path / name)
        assert "\n" not in str(error.value)


def test_a_run_starts_from_a_file_and_gives_it_back(
    compose_tree: Callable[..., DictConfig], original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file(load_file(original / WEIGHTS), tmp_path / "wan.safetensors")
    keys = ("vae.channels=4", "text_encoder.width=20", "flow.prediction=velocity")
    config = build(
        compose_tree("experiment=demo", f"model.init_from={tmp_path}/wan.safetensors", *keys), need_vae=False
    )
    assert (config.model.width, config.model.depth, config.model.heads, config.model.ffn) == (256, 2, 2, 40)
    network = starting_model(config)
    (tmp_path / "config.yaml").write_text(to_yaml(replace(config, vae=replace(config.vae, path=None))))
    monkeypatch.setattr(export, "load", lambda *a, **k: config)
    monkeypatch.setattr(export, "trained_weights", lambda _: network.state_dict())
    arguments = ["export", f"run_dir={tmp_path}", f"out={tmp_path / 'out'}", "format=original", "dtype=bf16"]
    monkeypatch.setattr(sys, "argv", arguments)
    assert export.main() == 0
    given, expected = load_file(tmp_path / "out" / WEIGHTS), load_file(original / WEIGHTS)
    assert given.keys() == expected.keys()
    assert all(torch.equal(given[name], expected[name].bfloat16()) for name in expected)
    with pytest.raises(InputError, match="vae.path=.* is a file; give a folder"):
        build(compose_tree("experiment=demo", f"vae.path={tmp_path}/wan.safetensors"))
    with pytest.raises(InputError, match="in the layout of Wan's own repository: train from it"):
        load(original)
