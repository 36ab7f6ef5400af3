"""Batch figures of a run from its configuration: parameters, passes, FLOPs, packing and balance."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from sora_train.config.cost import geometry, training_cost
from sora_train.config.registry import METHODS
from sora_train.config.schema import Config
from sora_train.core.world import World
from sora_train.data.order.balance import packed
from sora_train.data.order.plan import Plan
from sora_train.forecast.trace import Size
from sora_train.methods.base import trained

_Figures = tuple[int | None, float | None, float | None, float | None, float | None, float | None]  # as `Packed`


@dataclass(frozen=True)
class Estimate:
    """Batch figures of a run on a number of ranks. Those that need the plan are None without data."""

    ranks: int
    parameters: int  # of the trained networks
    frozen: int  # of these parameters, those that aren't trained (with adapters)
    passes: int  # forward passes per rank and step
    idle: float  # share of rank time that is idle because the groups of ranks don't divide the slots
    step_flops: int  # model FLOPs of a step with full slots
    steps_per_epoch: int | None
    fill: float | None  # share of the token budget that packs use
    balance: float | None  # mean over max cost of the slots of a step
    departure: float | None  # largest distance of a step's token shares from the mix, see `data.order.packing`
    slot_s: float | None  # seconds of a step's most expensive slot; None unless `data.cost` has measured costs
    shared: float | None = None  # share of the slots that belong to packs of several slots
    encoded: bool = False  # clips come as latents, computed before training


def estimate(config: Config, plan: Plan | None, ranks: int, encoded: bool = False) -> Estimate:
    """Compute the batch figures of a configuration.

    Args:
        config: Configuration of the run.
        plan: Its plan; None without data.
        ranks: Number of ranks.
        encoded: Without a plan: the clips come as latents, computed before training.
    """
    parameters, frozen = count_parameters(config)
    groups = max(1, ranks // config.parallel.sequence)
    slots, per_rank = config.data.slots, -(-config.data.slots // groups)
    longest = geometry(config).tokens(config.data.max_frames, *_square(config))
    clips = max(1, config.data.max_tokens // longest)
    flops = slots * training_cost(config).training([min(longest, config.data.max_tokens)] * clips)
    figures: _Figures = (None,) * 6
    idle = 1 - slots / (per_rank * groups)
    if plan is not None:
        figures, settings = packed(plan), plan.index.encoded()
        encoded = bool(settings) and "" not in settings
    return Estimate(ranks, parameters, frozen, passes_per_rank(config, ranks), idle, flops, *figures, encoded)


def count_parameters(config: Config) -> tuple[int, int]:
    """Number of parameters of the trained networks, and how many of these are frozen."""
    with torch.device("meta"):
        learner = METHODS.get(config.method).planned(config)
    every = [p for _, network in trained(learner.networks) for p in network.module.parameters()]
    return sum(p.numel() for p in every), sum(p.numel() for p in every if not p.requires_grad)


def passes_per_rank(config: Config, ranks: int) -> int:
    """Number of forward passes per rank and step."""
    groups = max(1, ranks // config.parallel.sequence)
    return config.parallel.accumulation or -(-config.data.slots // groups)


class Heaviest(NamedTuple):
    """The most expensive forward pass of a rank."""

    sizes: list[Size]  # frames, height, width of its clips
    share: float  # mean over steps of each step's most expensive pass, as a share of this one's cost
    ranks: int = 1  # number of ranks that share it


@dataclass(frozen=True)
class Degree:
    """A configuration with a degree of sequence parallelism for all packs, and its heaviest pass."""

    config: Config
    heaviest: Heaviest
    passes: int  # forward passes per rank and step


def degrees(config: Config, plan: Plan | None, ranks: int) -> dict[int, Degree]:
    """Configurations for the possible degrees of sequence parallelism, by degree.

    Degrees are powers of two up to 16 that divide the ranks and don't exceed the number of heads. The result is empty
    if the method doesn't support them, or if the plan sets the degree of each pack (`data.pack_slots` above 1).
    """
    found = {}
    if METHODS.get(config.method).splits_sequence and config.data.pack_slots == 1:
        for degree in (1, 2, 4, 8, 16):
            if config.model.heads >= degree and ranks % degree == 0:
                other = replace(config, parallel=replace(config.parallel, sequence=degree))
                found[degree] = Degree(other, heaviest_pass(other, plan, ranks), passes_per_rank(other, ranks))
    return found


def heaviest_pass(config: Config, plan: Plan | None, ranks: int, per_node: int = 8) -> Heaviest:
    """Find the most expensive forward pass: in the first window of the plan, or slots full of the longest clips.

    `per_node` is the number of ranks of one machine; only these can share a pack of several slots.
    """
    d, fixed = config.data, config.parallel.sequence
    per_rank = -(-d.slots // max(1, ranks // fixed))
    together = -(-per_rank // (config.parallel.accumulation or per_rank))  # slots per pass
    sharing = World(size=ranks, local_size=min(ranks, per_node)).sharing(d.pack_slots)
    if plan is None:
        longest, width = (d.max_frames, *_square(config)), 1
        while geometry(config).tokens(*longest) > width * d.max_tokens and width < d.pack_slots:
            width *= 2
        clips = max(1, width * d.max_tokens // geometry(config).tokens(*longest))
        return Heaviest([longest] * (clips * together), d.fill, min(width, sharing) * fixed)
    tokens, cost_of = plan.inputs.geometry.tokens, plan.inputs.cost
    most, total, steps = 0, 0, plan.steps(0, 0)
    found = Heaviest([], 1.0)
    for slots in steps:
        dearest = 0
        for first, width in set(slots.spans):
            sizes, shared = [v.size for v in slots[first]], min(width, sharing)
            load = cost_of.of_pack([tokens(*size) for size in sizes], [math.prod(size) for size in sizes], shared)
            dearest = max(dearest, load)
            if load > most:
                most, found = load, Heaviest(sizes * together, 1.0, shared * fixed)
        total += dearest
    return found._replace(share=total / len(steps) / most)


def _square(config: Config) -> tuple[int, int]:
    multiple = geometry(config).multiple
    side = max(1, round(config.data.max_pixels**0.5 / multiple)) * multiple
    return side, side
