"""Released weights: our DiT on diffusers' weights gives diffusers' numbers, and gives the weights back bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from omegaconf import DictConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from sora_train.config.load import build
from sora_train.core.batch import Grid, Layout
from sora_train.core.cli import InputError
from sora_train.flow.patches import patchify, unpatchify
from sora_train.models.video_model import build_video_model
from sora_train.models.wan.convert import load_wan, save_wan, wan_name
from sora_train.models.wan.model import DiT
from sora_train.models.wan.released import transformer_shape
from sora_train.models.wan.settings import WanConfig

TEXT, CHANNELS = 20, 4
SHAPES: dict[str, dict[str, Any]] = {
    "wide head": {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 48, "num_layers": 2, "freq_dim": 16},
    "odd split": {"num_attention_heads": 3, "attention_head_dim": 16, "ffn_dim": 40, "num_layers": 1, "freq_dim": 32},
}
GRIDS: tuple[Grid, ...] = ((3, 2, 4), (1, 3, 3), (5, 2, 2))


def released(folder: Path, shape: str) -> WanTransformer3DModel:
    """A random Wan transformer, saved as diffusers does, with no weight left at zero."""
    torch.manual_seed(0)
    wan = WanTransformer3DModel(
        patch_size=(1, 2, 2), in_channels=CHANNELS, out_channels=CHANNELS, text_dim=TEXT, rope_max_seq_len=32,
        **SHAPES[shape],
    )  # fmt: skip
    with torch.no_grad():
        for p in wan.parameters():
            p.add_(0.1 * torch.randn_like(p))
    wan.save_pretrained(folder)
    return wan


def ours(folder: Path) -> DiT:
    s = transformer_shape(folder)
    dit = DiT(
        s["channels"] * 4, s["width"], s["depth"], s["heads"], s["ffn"], s["text_width"], frequencies=s["frequencies"]
    )
    load_wan(dit, folder)
    return dit


def clip(grid: Grid, texts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, padded text and a timestep per frame of one clip; the first frame is given (t = 0), as in TI2V."""
    generator = torch.Generator().manual_seed(sum(grid))
    latents = torch.randn(CHANNELS, grid[0], grid[1] * 2, grid[2] * 2, generator=generator)
    text = torch.cat((torch.randn(texts, TEXT, generator=generator), torch.zeros(7 - texts, TEXT)))
    t_T = torch.full((grid[0],), 0.125 * sum(grid) % 1)
    t_T[0] = 0.0
    return latents, text, t_T


def theirs_of(wan: WanTransformer3DModel, grid: Grid, texts: int, per_frame: bool) -> Tensor:
    """Diffusers' velocity: one timestep for all, or one per token, each from 0 to 1000."""
    latents, text, t_T = clip(grid, texts)
    tokens_T = t_T.repeat_interleave(grid[1] * grid[2]).unsqueeze(0) * 1000
    timestep = tokens_T if per_frame else t_T[-1:] * 1000
    return wan(latents.unsqueeze(0), timestep, text.unsqueeze(0), return_dict=False)[0][0]


def ours_of(dit: DiT, grids: tuple[Grid, ...], texts: tuple[int, ...], per_frame: bool) -> list[Tensor]:
    """Our velocities of clips run as one pack."""
    clips = [clip(grid, n) for grid, n in zip(grids, texts, strict=True)]
    layout = Layout(grids, (7,) * len(grids))
    t_M = torch.cat([t_T for *_, t_T in clips])
    first = [sum(g[0] for g in grids[:i]) for i in range(len(grids))]
    t_of = [
        torch.arange(g[0]) + at if per_frame else torch.full((g[0],), at + g[0] - 1)
        for g, at in zip(grids, first, strict=True)
    ]
    t_of_N = torch.cat([t.repeat_interleave(g[1] * g[2]) for t, g in zip(t_of, grids, strict=True)])
    x_NP = torch.cat([patchify(latents, 2) for latents, *_ in clips])
    v_NP = dit(x_NP, torch.cat([text for _, text, _ in clips]), t_M, t_of_N, layout)
    return [unpatchify(v, g, 2) for v, g in zip(v_NP.split(layout.lengths), grids, strict=True)]


def close(mine: Tensor, their: Tensor, name: str = "") -> None:
    """1e-5 of the largest value, so that no element may be off by more than rounding."""
    largest = max(1.0, float(their.detach().abs().max()))
    torch.testing.assert_close(mine, their, rtol=1e-5, atol=1e-5 * largest, msg=name or None)


@pytest.mark.parametrize("per_frame", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_gradients_equal_diffusers(tmp_path: Path, shape: str, per_frame: bool) -> None:
    """Clips of different sizes run as one pack, against diffusers one by one."""
    wan, texts = released(tmp_path, shape), (5, 7, 1)
    dit = ours(tmp_path)
    packed = ours_of(dit, GRIDS, texts, per_frame)
    for mine, grid, n in zip(packed, GRIDS, texts, strict=True):
        their = theirs_of(wan, grid, n, per_frame)
        assert their.std() > 0.1
        close(mine, their)
        their.square().sum().backward()
    sum(v.square().sum() for v in packed).backward()
    their_gradients = {name: p.grad for name, p in wan.named_parameters()}
    for name, p in dit.named_parameters():
        gradient = their_gradients.pop(wan_name(name))
        if name == "patch_in.weight":
            gradient = gradient.permute(0, 2, 3, 4, 1).flatten(1)
        close(p.grad, gradient.view_as(p.grad), name)
    assert not their_gradients


def test_a_round_trip_is_bit_exact_and_loads_in_diffusers(tmp_path: Path) -> None:
    wan = released(tmp_path / "in", "wide head")
    shape = transformer_shape(tmp_path / "in")
    model = WanConfig(width=24, depth=2, heads=2, ffn=48, frequencies=16)
    save_wan(ours(tmp_path / "in").state_dict(), model, TEXT, tmp_path / "out")
    assert transformer_shape(tmp_path / "out") == shape
    again = WanTransformer3DModel.from_pretrained(tmp_path / "out")
    before, after = wan.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_weights_in_several_files_load_too(tmp_path: Path) -> None:
    released(tmp_path, "odd split").save_pretrained(tmp_path / "many", max_shard_size="10KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    for one, many in zip(ours(tmp_path).parameters(), ours(tmp_path / "many").parameters(), strict=True):
        assert torch.equal(one, many)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda w: w.pop("blocks.0.attn1.to_q.weight"), r"misses 1 tensor\(s\): blocks.0.attn1.to_q.weight"),
        (lambda w: w.update({"blocks.9.norm2.bias": torch.ones(1)}), r"surplus of 1 tensor\(s\): blocks.9.norm2.bias"),
        (lambda w: w.update({"proj_out.bias": torch.ones(3)}), r"other shapes: 1 tensor\(s\): proj_out.bias \(3,\)"),
    ],
)
def test_weights_that_do_not_fit_are_listed(tmp_path: Path, damage: Callable[..., Any], message: str) -> None:
    released(tmp_path, "wide head")
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    damage(weights)
    save_file(weights, file)
    with pytest.raises(InputError, match=message):
        ours(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "LTXVideoTransformer3DModel"}, "holds a LTXVideoTransformer3DModel"),
        ({"image_dim": 1280}, "image_dim"),
        ({"in_channels": 36}, "in_channels"),
        ({"patch_size": [2, 2, 2]}, "patch_size"),
    ],
)
def test_transformers_of_another_kind_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    released(tmp_path, "wide head")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(InputError, match=message):
        transformer_shape(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"absolute_positions": True}, {"pooled_text": True}, {"rope_theta": 100.0}, {"activation": "relu2"},
    ],
)  # fmt: skip
def test_a_model_that_wan_does_not_know_is_not_written(tmp_path: Path, change: dict[str, Any]) -> None:
    model = WanConfig(width=24, depth=2, heads=2, ffn=48, **change)
    with pytest.raises(InputError, match="format=diffusers is for Wan"):
        save_wan({}, model, TEXT, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("model", "channels", "published"), [("1b3", 16, 1_418_996_800), ("14b", 16, None), ("5b", 48, None)]
)
def test_sizes_have_the_parameters_of_the_released_models(
    compose_tree: Callable[..., DictConfig], model: str, channels: int, published: int | None
) -> None:
    overrides = ("vae.path=null", f"vae.channels={channels}", "text_encoder.width=4096", f"model={model}")
    config = build(compose_tree("experiment=demo", *overrides, "vae.path=x"), need_vae=False)
    m = config.model
    with torch.device("meta"):
        count = sum(p.numel() for p in build_video_model(config).dit.parameters())
        wan = WanTransformer3DModel(
            num_attention_heads=m.heads, attention_head_dim=128, in_channels=channels, out_channels=channels,
            text_dim=4096, freq_dim=256, ffn_dim=m.ffn, num_layers=m.depth,
        )  # fmt: skip
    assert m.width == m.heads * 128
    assert count == sum(p.numel() for p in wan.parameters())
    assert published is None or count == published
