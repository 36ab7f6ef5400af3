"""Batch arithmetic of a run from its configuration: parameters, passes, FLOPs, packing and balance."""

from __future__ import annotations

import math
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
    slot_s: float | None  # seconds of a step's dearest slot, where `data.cost` has measured ones
    encoded: bool = False  # clips come as latents, computed before training


def estimate(config: Config, plan: Plan | None, ranks: int, encoded: bool = False) -> Estimate:
    """Compute the batch figures of a configuration, and of its plan if there is data, which says if it is encoded."""
    parameters, frozen = count_parameters(config)
    groups = max(1, ranks // config.parallel.sequence)
    slots, per_rank = config.data.slots, -(-config.data.slots // groups)
    longest = geometry(config).tokens(config.data.max_frames, *_square(config))
    clips = max(1, config.data.max_tokens // longest)
    flops = slots * training_cost(config).training([min(longest, config.data.max_tokens)] * clips)
    no_plan = (None, None, None, None, None)
    figures: tuple[int | None, float | None, float | None, float | None, float | None] = no_plan
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


@dataclass(frozen=True)
class Degree:
    """A configuration with a degree of sequence parallelism, and its heaviest pass (see `heaviest_pass`)."""

    config: Config
    sizes: list[Size]
    share: float
    passes: int  # forward passes per rank and step


def degrees(config: Config, plan: Plan | None, ranks: int) -> dict[int, Degree]:
    """Degrees of sequence parallelism up to 16 that divide the heads and the ranks."""
    found = {}
    if METHODS.get(config.method).splits_sequence:
        for degree in (1, 2, 4, 8, 16):
            if config.model.heads % degree == 0 and ranks % degree == 0:
                other = replace(config, parallel=replace(config.parallel, sequence=degree))
                found[degree] = Degree(other, *heaviest_pass(other, plan, ranks), passes_per_rank(other, ranks))
    return found


def heaviest_pass(config: Config, plan: Plan | None, ranks: int) -> tuple[list[Size], float]:
    """Find the most expensive forward pass: in the first window of the plan, or slots full of the longest clips.

    Returns:
        Sizes (frames, height, width) of its clips, and the mean over steps of each step's most expensive pass, as a
        share of its cost.
    """
    per_rank = -(-config.data.slots // max(1, ranks // config.parallel.sequence))
    together = -(-per_rank // (config.parallel.accumulation or per_rank))  # slots per pass
    if plan is None:
        longest = (config.data.max_frames, *_square(config))
        clips = max(1, config.data.max_tokens // geometry(config).tokens(*longest))
        return [longest] * (clips * together), config.data.fill
    tokens, cost_of = plan.inputs.geometry.tokens, plan.inputs.cost
    dearest: list[Size] = []
    most, total, steps = 0, 0, plan.steps(0, 0)
    for slots in steps:
        loads = {
            cost_of.of_slot([tokens(*v.size) for v in slot], [math.prod(v.size) for v in slot]): slot for slot in slots
        }
        total += max(loads)
        if max(loads) > most:
            most, dearest = max(loads), [v.size for v in loads[max(loads)]]
    return dearest * together, total / len(steps) / most


def _square(config: Config) -> tuple[int, int]:
    multiple = geometry(config).multiple
    side = max(1, round(config.data.max_pixels**0.5 / multiple)) * multiple
    return side, side
