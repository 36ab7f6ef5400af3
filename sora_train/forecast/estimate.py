"""Batch arithmetic of a run from its configuration alone: parameters, passes, FLOPs, packing, balance."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from sora_train.config.cost import geometry, training_cost
from sora_train.config.registry import METHODS
from sora_train.config.schema import Config
from sora_train.data.order.balance import packed
from sora_train.data.order.plan import Plan
from sora_train.forecast.trace import Size
from sora_train.methods.base import trained


@dataclass(frozen=True)
class Estimate:
    """Figures of a run on `ranks` ranks."""

    ranks: int
    parameters: int  # of the trained networks
    frozen: int  # of them, those that aren't trained
    passes: int  # per rank and step
    idle: float  # share of the places in a step that no slot fills
    step_flops: int  # of a full step
    steps_per_epoch: int | None
    fill: float | None  # share of the token budget that packs use
    balance: float | None  # mean over max cost of the slots of a step
    departure: float | None  # of a step's make-up from the mix, the farthest step of a window


def estimate(config: Config, plan: Plan | None, ranks: int) -> Estimate:
    """Figures of a configuration and, where there is data, its plan."""
    parameters, frozen = count_parameters(config)
    groups = max(1, ranks // config.parallel.sequence)
    slots, per_rank = config.data.slots, -(-config.data.slots // groups)
    longest = geometry(config).tokens(config.data.max_frames, *_square(config))
    clips = max(1, config.data.max_tokens // longest)
    flops = slots * training_cost(config).training([min(longest, config.data.max_tokens)] * clips)
    figures = packed(plan) if plan is not None else (None, None, None, None)
    idle = 1 - slots / (per_rank * groups)
    return Estimate(ranks, parameters, frozen, passes_per_rank(config, ranks), idle, flops, *figures)


def count_parameters(config: Config) -> tuple[int, int]:
    """Parameters of the networks that a run trains, and those of them that stay frozen."""
    with torch.device("meta"):
        learner = METHODS.get(config.method).planned(config)
    every = [p for _, network in trained(learner.networks) for p in network.module.parameters()]
    return sum(p.numel() for p in every), sum(p.numel() for p in every if not p.requires_grad)


def passes_per_rank(config: Config, ranks: int) -> int:
    """Forward passes of a rank in a step."""
    groups = max(1, ranks // config.parallel.sequence)
    return config.parallel.accumulation or -(-config.data.slots // groups)


@dataclass(frozen=True)
class Degree:
    """A configuration in which so many ranks share a pack, its heaviest pass, and that one's share as below."""

    config: Config
    sizes: list[Size]
    share: float
    passes: int


def degrees(config: Config, plan: Plan | None, ranks: int) -> dict[int, Degree]:
    """The degrees of sequence parallelism that the heads and the ranks divide by, up to 16."""
    found = {}
    if METHODS.get(config.method).splits_sequence:
        for degree in (1, 2, 4, 8, 16):
            if config.model.heads % degree == 0 and ranks % degree == 0:
                other = replace(config, parallel=replace(config.parallel, sequence=degree))
                found[degree] = Degree(other, *heaviest_pass(other, plan, ranks), passes_per_rank(other, ranks))
    return found


def heaviest_pass(config: Config, plan: Plan | None, ranks: int) -> tuple[list[Size], float]:
    """Sizes of the clips of the dearest forward pass, and what the dearest pass of a mean step costs relative to it.

    With a plan it is that of the first window; else the slots are taken to be full of the longest clips.
    """
    per_rank = -(-config.data.slots // max(1, ranks // config.parallel.sequence))
    together = -(-per_rank // (config.parallel.accumulation or per_rank))  # slots in one pass
    if plan is None:
        longest = (config.data.max_frames, *_square(config))
        clips = max(1, config.data.max_tokens // geometry(config).tokens(*longest))
        return [longest] * (clips * together), config.data.fill
    tokens, cost_of = plan.inputs.geometry.tokens, plan.inputs.cost
    dearest: list[Size] = []
    most, total, steps = 0, 0, plan.steps(0, 0)
    for slots in steps:
        loads = {cost_of.training([tokens(*v.size) for v in slot]): slot for slot in slots}
        total += max(loads)
        if max(loads) > most:
            most, dearest = max(loads), [v.size for v in loads[max(loads)]]
    return dearest * together, total / len(steps) / most


def _square(config: Config) -> tuple[int, int]:
    multiple = geometry(config).multiple
    side = max(1, round(config.data.max_pixels**0.5 / multiple)) * multiple
    return side, side
