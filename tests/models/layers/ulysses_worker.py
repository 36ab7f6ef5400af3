"""What the ranks of test_ulysses.py run: the loss and gradients of packs, shared out, against this rank alone."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from torch import Tensor

from sora_train.config.schema import FlowConfig, OptimConfig, Precision
from sora_train.core.batch import LatentPack, Layout, Stream
from sora_train.core.world import World, from_environment
from sora_train.flow.ode import Request, generate
from sora_train.models.layers import ulysses
from sora_train.models.text.encoder import TextEncoder, tokenize_captions
from sora_train.models.video_model import VideoModel
from sora_train.models.wan.family import WAN
from sora_train.models.wan.model import DiT
from sora_train.training.engine.optim import adamw
from sora_train.training.engine.process_group import connect
from sora_train.training.engine.zero import Pace
from tests import stubs

BLANK = Layout(((1, 1, 1),), (1,))
MIXED = (
    Layout(((5, 2, 3),), (4,)), Layout(((1, 3, 3), (2, 2, 2)), (2, 6)), Layout(((2, 1, 1),), (3,)),
    Layout(((7, 3, 3), (1, 1, 2)), (5, 1)), Layout(((3, 3, 1),), (2,)),
)  # fmt: skip
LAYOUTS = (Layout(((3, 2, 3), (1, 3, 3), (2, 2, 2)), (4, 1, 6)), Layout(((2, 3, 4), (1, 1, 1)), (2, 3)))


def make_network(heads: int = 4) -> VideoModel:
    torch.manual_seed(0)
    network = VideoModel(DiT(8, 8 * heads, 2, heads, 64, 16, absolute_positions=True), TextEncoder(16, 1, 2, 64), WAN)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return network


def make_pack(layout: Layout) -> LatentPack:
    generator = torch.Generator().manual_seed(layout.tokens)
    x, target = (torch.randn(layout.tokens, 8, generator=generator) for _ in range(2))
    ids = torch.randint(0, 64, (sum(layout.texts), 2), generator=generator)
    t_of = torch.randint(0, 3, (layout.tokens,), generator=generator)
    weight = (t_of > 0).float()
    video = Stream(layout, x, target, weight, torch.tensor([0.0, 0.4, 0.8]), t_of, weight)
    return LatentPack({"video": video}, ids)


def loss_of(network: Any, pack: LatentPack) -> Tensor:
    return ((network(pack) - pack.video.target_NP).square().mean(1) * pack.video.weight_N).sum()


def alone(layouts: Sequence[Layout] = LAYOUTS, heads: int = 4) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of all packs over their weight, on one rank."""
    network = make_network(heads)
    packs = [make_pack(layout) for layout in layouts]
    loss = sum(loss_of(network, p) for p in packs) / sum(p.video.weight_N.sum() for p in packs)
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in network.named_parameters()}


def shared(world: World, stage: int) -> tuple[float, dict[str, Tensor]]:
    """The same under the engine: groups share out packs, the ranks of a group the tokens of a pack."""
    mine: list[tuple[Layout | None, int]] = [
        (one, world.sequence) for one in LAYOUTS[world.data_rank :: world.data_size]
    ]
    return together(make_network(), ulysses.sequence_groups(world), mine, stage)


def mixed(world: World, stage: int) -> tuple[float, dict[str, Tensor]]:
    """The same where each pack has ranks of its own: two share one beside two that each have one, then four share one,
    then one rank has one and the others have nothing. No number of ranks divides the three heads."""
    mine: list[tuple[Layout | None, int]] = [
        (MIXED[0], 2) if world.rank < 2 else (MIXED[world.rank - 1], 1), (MIXED[3], 4),
        (MIXED[4] if world.rank == 2 else None, 1),
    ]  # fmt: skip
    return together(make_network(3), ulysses.sequence_groups(world, 4), mine, stage)


def together(
    network: VideoModel, groups: ulysses.Groups, mine: Sequence[tuple[Layout | None, int]], stage: int
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients over all ranks, of which this one has a pass for each pack, shared by so many; None: none."""
    network.split_sequence(groups)
    options = {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}}
    optimizer = adamw([(network, 1.0)], OptimConfig())
    engine = stubs.engine(network, optimizer, Precision.fp32, len(mine), 1e9, options)
    packs = [replace(make_pack(layout or BLANK), ranks=ranks) for layout, ranks in mine]
    for pack, (layout, _) in zip(packs, mine, strict=True):
        pack.video.weight_N *= layout is not None
    total = torch.stack([p.video.weight_N.sum() / ranks for p, (_, ranks) in zip(packs, mine, strict=True)]).sum()
    dist.all_reduce(total)
    loss = torch.zeros(())
    for pack, (_, ranks) in zip(packs, mine, strict=True):
        engine.pace = Pace(float(total))
        part = loss_of(engine, pack) / ranks
        engine.backward(part)
        loss += part.detach() / total
    dist.all_reduce(loss)
    gradients = {
        name.removeprefix("net/"): safe_get_full_grad(p).view(engine.shapes[name]) for p, name in engine.names.items()
    }
    assert engine.step()
    return float(loss), gradients


def close(mine: Tensor, their: Tensor, scale: float, name: str) -> None:
    assert (mine - their).abs().max() <= 1e-5 * scale, (name, float((mine - their).abs().max()), scale)


def sampled(network: VideoModel) -> list[Tensor]:
    """Clips of two sizes, one with a given frame, whose 39 tokens don't divide by the ranks."""
    requests = [Request("a ring", (3, 2, 2), 1), Request("two", (3, 3, 3), 2, ((0, torch.ones(2, 1, 6, 6)),))]
    flow = FlowConfig(sampling_steps=3, solver="heun", guidance_rescale=0.5)
    tokenize = partial(tokenize_captions, buckets=64, max_tokens=16)
    return generate(network.eval(), requests, flow, 2, 2, tokenize, device=torch.device("cpu"))


def equal(cases: list[tuple[int, int]]) -> None:
    """Each case is a degree (0: each pack has its own) and a ZeRO stage."""
    world = from_environment()
    connect(world)
    for degree, stage in cases:
        loss, gradients = alone() if degree else alone(MIXED, 3)
        scale = max(float(g.abs().max()) for g in gradients.values())
        assert scale > 0.01
        ours, our_gradients = shared(world.with_sequence(degree), stage) if degree else mixed(world, stage)
        assert abs(ours - loss) <= 1e-5 * loss, (ours, loss)
        assert our_gradients.keys() == gradients.keys()
        for name, gradient in gradients.items():
            close(our_gradients[name], gradient, scale, name)
        if world.is_main:
            print(f"degree {degree}, stage {stage}: equal to one rank", flush=True)
    network = make_network()
    expected = sampled(network)
    network.split_sequence(ulysses.sequence_groups(world.with_sequence(world.size)))
    for one, other in zip(sampled(network), expected, strict=True):
        close(one, other, float(other.abs().max()), "sample")
    print(f"rank {world.rank}: samples equal to one rank's", flush=True)
    dist.barrier()


equal([(int(case[0]), int(case[2])) for case in sys.argv[1:]])
