"""Packing: divides items of known tokens and cost among steps of equal slots, by integers and hashes alone.

Items are distributed so that every step has the composition of the whole mix. If each of the most expensive items would
exceed the load of a slot, the expensive end of the mix is distributed in runs instead: few steps then have the most
expensive items, and these steps are expensive in all slots. The resulting departure from the mix is measured and
bounded. `step_packs.py` assigns the items of a step to its packs.

With `most` above 1, a pack may take 2, 4, ... `most` neighbouring slots, whose ranks share its tokens: the load of each
is the pack's cost divided by their number.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sora_train.core.seeds import order
from sora_train.data.order.step_packs import Items, Packs, deal

MAX_DEPARTURE = 125  # thousandths of a step's tokens that may lie in other octaves of cost than the mix has them
_ENOUGH = 995  # thousandths: no more runs once the dearest items allow this balance
_RUNS = (0, 1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24)  # items of a step that are dealt in runs, in sixteenths of its slots
_STEPS, _SLOTS = (1 << 33) + np.arange(2)  # streams of this module's hashes


def pack(
    tokens: np.ndarray, costs: np.ndarray, slots: int, max_tokens: int, fill: float, seed: int, *, most: int = 1,
    undivided: np.ndarray | int = 0,
) -> list[list[list[int]]]:  # fmt: skip
    """Divide all items among the fewest steps of `slots` slots under `max_tokens` that `fill` allows.

    Args:
        tokens: Tokens of each item; at most `most * max_tokens`.
        costs: Cost of each item; must not fall as tokens rise.
        slots: Slots of a step, at least `most`.
        max_tokens: Token budget of a slot.
        fill: Target share of the token budget.
        seed: Seed of the order of steps and slots.
        most: Most slots that a pack may take, a power of two.
        undivided: Part of each item's cost that every rank of a shared pack bears in full.

    Returns:
        The items of each slot of each step. Slots that a pack takes beside its first are empty; see `spans`.
    """
    scale = 1 + int(costs.max()) // (2**31 // most)  # sums over a window stay far inside 64 bits
    costs = costs // scale
    whole = np.minimum(undivided // scale, costs)
    widths = [1 << n for n in range(most.bit_length())]
    loads = {width: most * whole + (costs - whole) * (most // width) for width in widths}
    count = max(1, -(-int(tokens.sum()) // max(1, int(slots * max_tokens * fill))))
    by_cost = np.lexsort((np.arange(len(costs)), -costs))
    items = Items(tokens.tolist(), {width: load.tolist() for width, load in loads.items()}, max_tokens)
    while True:
        step_of = _deal_to_steps(tokens, costs, by_cost, count, slots, limits=(loads[1], loads[most]))
        steps: list[Packs] = []
        left: list[int] = []
        for step in order(seed, _STEPS, np.arange(count)).tolist():
            dealt = by_cost[step_of[by_cost] == step].tolist()
            dealt = sorted(dealt + left, key=lambda i: (-items.loads[1][i], i)) if left else dealt
            packs, left = deal(dealt, items, slots)
            steps.append(packs)
        if not left:
            break
        count += 1
    shuffled = [order(seed, _SLOTS, step, np.arange(slots)).tolist() for step in range(count)]
    return [_in_slots(step, places) for step, places in zip(steps, shuffled, strict=True) if any(step.items)]


def spans(packs: Sequence[Sequence[int]], most: int) -> list[tuple[int, int]]:
    """The pack to which each slot of a step belongs: the pack's first slot, and the number of slots it takes.

    A pack takes its first slot and the empty ones behind it: the largest power of two up to `most` that divides the
    number of its first slot.
    """
    found: list[tuple[int, int]] = []
    while (slot := len(found)) < len(packs):
        width = 1
        while (
            packs[slot] and 2 * width <= most and slot % (2 * width) == 0 and slot + 2 * width <= len(packs)
            and not any(packs[slot + width : slot + 2 * width])
        ):  # fmt: skip
            width *= 2
        found += [(slot, width)] * width
    return found


def departure(tokens: np.ndarray, costs: np.ndarray, step_of: np.ndarray, count: int) -> np.ndarray:
    """Distance of each step's make-up from the mix, in thousandths: the total-variation distance of its token share by
    octave of item cost from that of all steps together."""
    octave = np.searchsorted(1 << np.arange(62), costs, side="right")
    table = np.zeros((count, int(octave.max()) + 1), dtype=np.int64)
    np.add.at(table, (step_of, octave), tokens)
    mix, total = table.sum(0), int(tokens.sum())
    mine = table.sum(1, keepdims=True)
    # |a / mine - b / total| / 2 as one fraction, in Python's integers: the products outgrow 64 bits
    over = np.abs(table.astype(object) * total - mix.astype(object) * mine).sum(1)
    return np.array([1000 * int(o) // max(1, 2 * total * int(m)) for o, m in zip(over, mine[:, 0], strict=True)])


def _in_slots(packs: Packs, places: list[int]) -> list[list[int]]:
    """The packs in their slots, the widest first, so that each begins at a multiple of its slots."""
    numbers = sorted((n for n in places if n < len(packs.widths)), key=lambda n: -packs.widths[n])
    return [slot for n in numbers for slot in (packs.items[n], *([] for _ in range(packs.widths[n] - 1)))]


def _deal_to_steps(
    tokens: np.ndarray, costs: np.ndarray, by_cost: np.ndarray, count: int, slots: int, *,
    limits: tuple[np.ndarray, np.ndarray],
) -> np.ndarray:  # fmt: skip
    """The step of each item, with the shortest runs of expensive items that allow the slots of a step to be equal.

    `limits` are the loads of the items in one slot, and in as many as a pack may take.
    """
    best, best_bound = None, -1
    for sixteenths in _RUNS if count > 1 else _RUNS[:1]:
        step_of = _in_blocks(tokens, by_cost, count, sixteenths * slots // 16)
        bound = _bound(*limits, step_of, count, slots)
        if bound > best_bound and (best is None or departure(tokens, costs, step_of, count).max() <= MAX_DEPARTURE):
            best, best_bound = step_of, bound
        if best_bound >= _ENOUGH:
            break
    assert best is not None
    return best


def _in_blocks(tokens: np.ndarray, by_cost: np.ndarray, count: int, run: int) -> np.ndarray:
    """The dearest `count * run` items in runs of `run`, a run to a step; the rest in blocks of `count`, one item of
    each block to each step, the largest to the step with the fewest tokens so far."""
    step_of = np.empty(len(by_cost), dtype=np.int64)
    load = np.zeros(count, dtype=np.int64)
    start = min(run, len(by_cost) // count) * count
    if start:
        step_of[by_cost[:start]] = np.repeat(np.arange(count), start // count)
        np.add.at(load, step_of[by_cost[:start]], tokens[by_cost[:start]])
    for begin in range(start, len(by_cost), count):
        block = by_cost[begin : begin + count]
        steps = np.argsort(load, kind="stable")[: len(block)]
        step_of[block] = steps
        load[steps] += tokens[block]
    return step_of


def _bound(whole: np.ndarray, least: np.ndarray, step_of: np.ndarray, count: int, slots: int) -> int:
    """Thousandths of balance (mean over max load of a step's slots, averaged over steps) that no packing can pass:
    the dearest slot bears at least the dearest item, in as many slots as a pack may take."""
    total, dearest = np.zeros((2, count), dtype=np.int64)
    np.add.at(total, step_of, whole)
    np.maximum.at(dearest, step_of, least)
    return int((1000 * total // np.maximum(np.maximum(total, slots * dearest), 1)).sum()) // count
