"""Tokens and FLOPs are what the networks really do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from omegaconf import DictConfig
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sora_train.batch import LatentPack, Layout
from sora_train.config import Config, build
from sora_train.cost import TEXT_TOKENS, Cost, Geometry, cost, geometry, patch_features
from sora_train.generation import build_vae, build_video_model

SHAPE = ("vae.patch=4", "vae.widths=[32,64]", "vae.blocks=[0,2]", "vae.strides=[[4,1]]")  # whatever the demo's may be


@pytest.mark.parametrize(
    ("size", "grid"),
    [((1, 32, 32), (1, 4, 4)), ((17, 32, 48), (5, 4, 6)), ((5, 8, 8), (2, 1, 1)), ((4, 8, 8), (1, 1, 1))],
)
def test_a_clip_has_one_token_per_patch_and_latent_frame(size: tuple[int, int, int], grid: tuple[int, ...]) -> None:
    g = Geometry(temporal_stride=4, spatial_stride=4, patch=2)
    assert g.multiple == 8
    assert g.grid(*size) == grid
    assert g.tokens(*size) == grid[0] * grid[1] * grid[2]


def test_training_costs_three_forward_passes_and_attention_stays_inside_a_clip() -> None:
    c = Cost(per_token=10, per_pair=2)
    assert c.forward(4) == 10 * 4 + 2 * 16
    assert c.training([4, 4]) == 3 * 2 * c.forward(4)
    assert c.training([8]) > c.training([4, 4])
    assert c.training([]) == 0


@pytest.fixture
def demo(compose_tree: Callable[..., DictConfig]) -> Config:
    return build(compose_tree("experiment=demo", "vae.path=nowhere", "model.patch=2", *SHAPE), need_vae=False)


def test_the_geometry_follows_the_method(compose_tree: Callable[..., DictConfig], demo: Config) -> None:
    assert geometry(demo) == Geometry(4, 4, 2)
    vae = build(compose_tree("experiment=demo_vae", *SHAPE))
    assert geometry(vae) == Geometry(4, 4, 1)
    assert patch_features(demo) == 6 * 2 * 2
    assert all(isinstance(n, int) for c in (cost(demo), cost(vae)) for n in (c.per_token, c.per_pair))


def test_flops_of_the_transformer_are_those_that_torch_counts(demo: Config) -> None:
    network = build_video_model(demo)
    grid = (5, 16, 16)
    n = grid[0] * grid[1] * grid[2]
    text = torch.zeros(TEXT_TOKENS, demo.text_encoder.width)
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        x, t_of = torch.zeros(n, patch_features(demo)), torch.zeros(n, dtype=torch.long)
        network.dit(x, text, torch.zeros(1), t_of, Layout((grid,), (TEXT_TOKENS,)))
    assert cost(demo).forward(n) == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_flops_of_the_autoencoder_are_those_that_torch_counts(compose_tree: Callable[..., DictConfig]) -> None:
    config = build(compose_tree("experiment=demo_vae", *SHAPE))
    network = build_vae(config.vae)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        mean, _ = network.encode(torch.zeros(1, 3, 33, 32, 32))
        network.decode(mean)
    assert cost(config).forward(mean[0, 0].numel()) == pytest.approx(counter.get_total_flops(), rel=0.2)


def test_the_text_encoder_is_small_beside_the_transformer(demo: Config) -> None:
    """It isn't counted; this is why that is allowed."""
    network = build_video_model(demo)
    counter = FlopCounterMode(display=False)
    n = geometry(demo).tokens(17, 32, 32)
    pack = LatentPack(
        Layout(((5, 4, 4),), (TEXT_TOKENS,)), torch.zeros(n, 24), *([torch.zeros(n)] * 2), torch.zeros(1),
        torch.zeros(n, dtype=torch.long), torch.zeros(n), torch.zeros(TEXT_TOKENS, dtype=torch.long),
    )  # fmt: skip
    with counter, torch.no_grad():
        network(pack)
    counts = counter.get_flop_counts()
    text = sum(counts["VideoModel.text"].values())
    assert 0 < text < 0.15 * counter.get_total_flops()
