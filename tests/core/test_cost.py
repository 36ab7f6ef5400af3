"""Tokens and FLOPs are what the networks really do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sora_train.config.cost import cost, geometry, shapes, training_cost
from sora_train.config.load import build
from sora_train.config.schema import Config
from sora_train.core.batch import LatentPack, Layout, Stream
from sora_train.core.cost import TEXT_TOKENS, Cost, Geometry
from sora_train.models.video_model import build_video_model, starting_model
from sora_train.models.video_vae.model import build_vae

SHAPE = (  # whatever the demo's may be
    "vae.channels=6", "vae.patch=4", "vae.widths=[32,64]", "vae.blocks=[0,2]", "vae.strides=[[4,1]]",
)  # fmt: skip


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
    model = ("model.patch=2", "model.pooled_text=false")
    return build(compose_tree("experiment=demo", "vae.path=nowhere", *model, *SHAPE), need_vae=False)


def test_the_geometry_follows_the_method(compose_tree: Callable[..., DictConfig], demo: Config) -> None:
    assert geometry(demo) == Geometry(4, 4, 2)
    vae = build(compose_tree("experiment=demo_vae", *SHAPE))
    assert geometry(vae) == Geometry(4, 4, 1)
    assert shapes(demo).patch_features == 6 * 2 * 2
    assert all(isinstance(n, int) for c in (cost(demo), cost(vae)) for n in (c.per_token, c.per_pair))


def plainly(q: Tensor, k: Tensor, v: Tensor, q_lengths: Tensor, k_lengths: Tensor) -> Tensor:
    """Attention in matrix products, whose FLOPs torch knows by itself."""
    parts = zip(q.split(q_lengths.tolist()), *(x.split(k_lengths.tolist()) for x in (k, v)), strict=True)
    swapped = ((a.transpose(0, 1), b.permute(1, 2, 0), c.transpose(0, 1)) for a, b, c in parts)
    return torch.cat([((a @ b).softmax(-1) @ c).transpose(0, 1) for a, b, c in swapped])


@pytest.mark.parametrize("plain", [True, False])
def test_flops_of_a_pack_are_exactly_those_that_torch_counts(demo: Config, plain: bool) -> None:
    """With attention in plain matrix products, and as counted by the formula of our own operation."""
    demo.model.absolute_positions = False  # their projection isn't counted
    network = build_video_model(demo)
    for block in network.dit.blocks if plain else ():
        block.self_attention.attend = block.cross_attention.attend = plainly
    layout = Layout(((5, 8, 8), (1, 4, 6), (2, 3, 3)), (TEXT_TOKENS, 7, 1))
    n = layout.tokens
    x, t_of = torch.zeros(n, shapes(demo).patch_features), torch.zeros(n, dtype=torch.long)
    text = torch.zeros(sum(layout.texts), demo.text_encoder.width)
    counter = FlopCounterMode(display=False)
    with counter:
        network.dit(x, text, torch.zeros(1), t_of, layout).sum().backward()
    ours = training_cost(demo).training(layout.lengths, layout.texts)
    counts = counter.get_flop_counts()
    forward_only = 2 * (n * shapes(demo).patch_features + text.numel()) * demo.model.width  # of inputs
    width, timestep = demo.model.width, 256 * demo.model.width + 7 * demo.model.width**2
    sums = of_sums(layout, width, demo.model.depth, tables=True, head=True, norms=True)
    assert sum(counts["Global"].values()) == ours - forward_only + 2 * (3 * timestep - 256 * width) + sums


def of_sums(layout: Layout, width: int, depth: int, tables: bool, head: bool, norms: bool) -> int:
    """FLOPs of sums over tokens that run as products with one row: gradients of modulation tables and norms' weights.

    Additions, so no FLOPs of the model. `tables`: six of a block; `head`: two of the last norm's, one timestep each.
    """
    wide, of_norms = 2 * layout.tokens * width, 3 * layout.tokens + sum(layout.texts)
    return wide * (6 * depth * tables + 2 * head) + 2 * width * depth * of_norms * norms


def of_timesteps(width: int, targets: str, rank: int) -> int:
    """FLOPs of the layers of one timestep, which the cost model leaves out: forward, and what of backward there is."""
    flops, before = 0, False  # whether the input has a gradient
    layers = {"time_in.0": (256, width), "time_in.2": (width, width), "time_modulation.1": (width, 6 * width)}
    for name, (inputs, outputs) in layers.items():
        flops += 2 * inputs * outputs * (1 + before)
        if name in targets.split(","):
            flops += 2 * rank * (2 * (inputs + outputs) + outputs + inputs * before)
        before |= name in targets.split(",")
    return flops


@pytest.mark.parametrize(
    "targets",
    ["q,k,v,out", "cross_attention.q", "cross_attention.k", "mlp.0", "text_in.0,q", "time_in.0", "out.project",
     "q,k,v,out,mlp.0,mlp.2,text_in.0,text_in.2,time_in.0,time_in.2,time_modulation.1,out.project"],
)  # fmt: skip
def test_flops_with_adapters_are_exactly_those_that_torch_counts(
    compose_tree: Callable[..., DictConfig], targets: str
) -> None:
    """Frozen layers have no gradient of their weights, and before the first adapter no backward pass at all."""
    keys = ("model.patch=2", "model.pooled_text=false", "model.absolute_positions=false", "model.depth=3")
    lora = ("model.lora.rank=4", f"model.lora.targets=[{targets}]")
    config = build(compose_tree("experiment=demo", "vae.path=nowhere", *keys, *SHAPE, *lora), need_vae=False)
    network = starting_model(config)
    layout = Layout(((5, 8, 8), (1, 4, 6), (2, 3, 3)), (TEXT_TOKENS, 7, 1))
    n = layout.tokens
    x, t_of = torch.zeros(n, shapes(config).patch_features), torch.zeros(n, dtype=torch.long)
    text = torch.zeros(sum(layout.texts), config.text_encoder.width)
    counter = FlopCounterMode(display=False)
    with counter:
        network.dit(x, text, torch.zeros(1), t_of, layout).sum().backward()
    ours = training_cost(config).training(layout.lengths, layout.texts)
    width, head = config.model.width, "time_in" in targets
    sums = of_sums(layout, width, config.model.depth, head or "time_modulation" in targets, head, norms=False)
    assert sum(counter.get_flop_counts()["Global"].values()) == ours + of_timesteps(width, targets, 4) + sums
    assert ours < 0.8 * cost(config).training(layout.lengths, layout.texts)


def test_a_caption_that_is_not_known_counts_as_a_typical_one(demo: Config) -> None:
    c = cost(demo)
    assert c.training([40, 8]) == c.training([40, 8], (TEXT_TOKENS, TEXT_TOKENS)) > c.training([40, 8], (1, 1))
    demo.text_encoder.pad_to = 512
    assert cost(demo).text_tokens == 512


def test_flops_of_the_autoencoder_are_those_that_torch_counts(compose_tree: Callable[..., DictConfig]) -> None:
    config = build(compose_tree("experiment=demo_vae", *SHAPE))
    network = build_vae(config.vae)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        mean, _ = network.encode(torch.zeros(1, 3, 33, 32, 32))
        network.decode(mean)
    assert cost(config).forward(mean[0, 0].numel()) == pytest.approx(counter.get_total_flops(), rel=0.2)


def test_the_text_encoder_is_small_beside_the_transformer(demo: Config) -> None:
    """It isn't counted: the demo, whose clips are the smallest, has the largest share."""
    network = build_video_model(demo)
    counter = FlopCounterMode(display=False)
    n = geometry(demo).tokens(17, 32, 32)
    video = Stream(
        Layout(((5, 4, 4),), (TEXT_TOKENS,)), torch.zeros(n, 24), *([torch.zeros(n)] * 2), torch.zeros(1),
        torch.zeros(n, dtype=torch.long), torch.zeros(n),
    )  # fmt: skip
    pack = LatentPack({"video": video}, torch.zeros(TEXT_TOKENS, 2, dtype=torch.long))
    with counter, torch.no_grad():
        network(pack)
    counts = counter.get_flop_counts()
    text = sum(counts["VideoModel.text"].values())
    assert 0 < text < 0.25 * counter.get_total_flops()
