"""Fill, balance and departure of a plan, in four figures."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sora_train.data.order.packing import departure
from sora_train.data.order.plan import Plan


class Packed(NamedTuple):
    """Figures of an epoch's number of steps and of its first window."""

    steps: int  # of an epoch
    fill: float  # share of the token budget that packs use
    balance: float  # mean over max cost of the slots of a step, averaged over steps
    departure: float  # of a step's make-up from the mix, the farthest step


def packed(plan: Plan) -> Packed:
    """The figures of a plan that has a step in its first window."""
    steps = plan.steps(0, 0)
    grid, cost_of, capacity = plan.inputs.geometry, plan.inputs.cost, plan.inputs.slots * plan.inputs.max_tokens
    used, balance = 0, 0.0
    flat: list[tuple[int, int]] = []
    for number, slots in enumerate(steps):
        lengths = [[grid.tokens(*visit.size) for visit in slot] for slot in slots]
        used += sum(map(sum, lengths))
        loads = [cost_of.training(slot) for slot in lengths]
        balance += sum(loads) / len(loads) / max(loads)
        flat += [(tokens, number) for slot in lengths for tokens in slot]
    tokens, step_of = np.array(flat, dtype=np.int64).T
    farthest = departure(tokens, cost_of.per_token * tokens + cost_of.per_pair * tokens**2, step_of, len(steps)).max()
    count = sum(len(plan.steps(0, window)) for window in range(len(plan.windows(0))))
    return Packed(count, used / (capacity * len(steps)), balance / len(steps), int(farthest) / 1000)
