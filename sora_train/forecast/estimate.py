"""What a run will need, from its configuration alone: parameters, memory, batch arithmetic, FLOPs, balance.

Memory is model states (Rajbhandari et al. 2020, "ZeRO", arXiv 1910.02054, section 3: weights and gradients in the
run's precision, fp32 master and two Adam moments, one fp32 EMA) plus a rule of thumb for activations: what can be said
at once. `footprint.py` has the figures of a traced pass.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from sora_train.config.cost import geometry, training_cost
from sora_train.config.schema import Config, Method, Precision
from sora_train.data.order.balance import packed
from sora_train.data.order.plan import Plan
from sora_train.forecast.trace import Size

# Activations of one block that backward needs, in model widths per token, by model.activation_checkpointing.
_SAVED_PER_TOKEN = {"none": 29, "block": 1, "selective": 3}


@dataclass(frozen=True)
class Estimate:
    """Figures of a run on `ranks` ranks."""

    ranks: int
    parameters: int
    frozen: int  # of them, those that aren't trained
    state_bytes: int  # per rank
    activation_bytes: int  # per rank, of the largest pack
    passes: int  # per rank and step
    idle: float  # share of the places in a step that no slot fills
    step_flops: int  # of a full step
    steps_per_epoch: int | None
    fill: float | None  # share of the token budget that packs use
    balance: float | None  # mean over max cost of the slots of a step
    departure: float | None  # of a step's make-up from the mix, the farthest step of a window


def estimate(config: Config, network: nn.Module, plan: Plan | None, ranks: int) -> Estimate:
    """Figures for a network (it may live on the meta device) and, where there is data, its plan."""
    parameters = sum(p.numel() for p in network.parameters())
    frozen = sum(p.numel() for p in network.parameters() if not p.requires_grad)
    stage = config.deepspeed.get("zero_optimization", {}).get("stage", 0)
    bytes_each = 4 if config.precision is Precision.fp32 else 2
    weights, gradients, optimizer = bytes_each, bytes_each, 4 + 4 + 4 + (4 if bytes_each == 2 else 0)
    if bytes_each == 4 and stage:
        optimizer += 4  # ZeRO keeps a master of its own even in fp32
    state = parameters * weights / (ranks if stage == 3 else 1) + (parameters - frozen) * (
        gradients / (ranks if stage >= 2 else 1) + optimizer / (ranks if stage else 1)
    )
    sequence = config.parallel.sequence
    groups = max(1, ranks // sequence)
    slots, per_rank = config.data.slots, -(-config.data.slots // groups)
    passes = config.parallel.accumulation or per_rank
    tokens = config.data.max_tokens * -(-per_rank // passes) / sequence
    kept = _SAVED_PER_TOKEN[config.model.activation_checkpointing] * config.model.depth
    working = _SAVED_PER_TOKEN["none"] if config.model.activation_checkpointing != "none" else 0  # the block recomputed
    activations = int(tokens * (kept + working) * config.model.width * bytes_each)
    longest = geometry(config).tokens(config.data.max_frames, *_square(config))
    clips = max(1, config.data.max_tokens // longest)
    flops = slots * training_cost(config).training([min(longest, config.data.max_tokens)] * clips)
    figures = packed(plan) if plan is not None else (None, None, None, None)
    idle = 1 - slots / (per_rank * groups)
    return Estimate(ranks, parameters, frozen, int(state), activations, passes, idle, flops, *figures)


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
    if config.method is Method.diffusion:
        for degree in (1, 2, 4, 8, 16):
            if config.model.heads % degree == 0 and ranks % degree == 0:
                other = replace(config, parallel=replace(config.parallel, sequence=degree))
                passes = config.parallel.accumulation or -(-config.data.slots // (ranks // degree))
                found[degree] = Degree(other, *heaviest_pass(other, plan, ranks), passes)
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


def meta_network(build: type[nn.Module] | object, *arguments: object) -> nn.Module:
    """Build a network without memory for its weights."""
    with torch.device("meta"):
        return build(*arguments)  # type: ignore[operator]
