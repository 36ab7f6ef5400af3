"""Fill, balance and departure of a plan, in a few figures."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from sora_train.core.cost import Seconds
from sora_train.data.order.packing import departure
from sora_train.data.order.plan import Plan


class Packed(NamedTuple):
    """Figures of an epoch's number of steps and of its first window."""

    steps: int  # of an epoch
    fill: float  # share of the token budget that packs use
    balance: float  # mean over max cost of the slots of a step, averaged over steps
    departure: float  # of a step's make-up from the mix, the farthest step
    seconds: float | None  # of the dearest slot of a step, averaged over steps, where its cost was measured
    shared: float  # share of the slots that are in packs of several


def packed(plan: Plan) -> Packed:
    """The figures of a plan that has a step in its first window."""
    steps = plan.steps(0, 0)
    grid, cost_of, capacity = plan.inputs.geometry, plan.inputs.cost, plan.inputs.slots * plan.inputs.max_tokens
    used, dearest, balance, shared = 0, 0, 0.0, 0
    flat: list[tuple[int, int, int]] = []
    for number, slots in enumerate(steps):
        sizes = [[visit.size for visit in slot] for slot in slots]
        lengths = [[grid.tokens(*size) for size in slot] for slot in sizes]
        pixels = [[math.prod(size) for size in slot] for slot in sizes]
        used += sum(map(sum, lengths))
        loads = [cost_of.of_pack(lengths[first], pixels[first], width) for first, width in slots.spans]
        shared += sum(width > 1 for _, width in slots.spans)
        balance += sum(loads) / len(loads) / max(loads)
        dearest += max(loads)
        flat += [(n, v, number) for slot in zip(lengths, pixels, strict=True) for n, v in zip(*slot, strict=True)]
    tokens, seen, step_of = np.array(flat, dtype=np.int64).T
    farthest = departure(tokens, cost_of.of_clips(tokens, seen), step_of, len(steps)).max()
    count = sum(len(plan.steps(0, window)) for window in range(len(plan.windows(0))))
    seconds = dearest / len(steps) / 1e15 if isinstance(cost_of, Seconds) else None
    fill, part = used / (capacity * len(steps)), shared / (plan.inputs.slots * len(steps))
    return Packed(count, fill, balance / len(steps), int(farthest) / 1000, seconds, part)
