"""Packing: items of known tokens and cost to steps of equal slots, by integers and hashes alone.

Three moves. Items are dealt to steps so that every step has the whole mix. Where the dearest items would each outweigh
a slot, the dear end of the mix is dealt in runs instead, so that few steps hold the very dearest and those steps are
dear throughout; how far that takes a step's make-up from the mix is measured and bounded. Inside a step each item goes
to the cheapest slot with room, dearest first (Graham 1969, longest processing time), and swaps between dear and cheap
slots then even out what is left.
"""

from __future__ import annotations

from heapq import heappop, heappush, heapreplace

import numpy as np

from sora_train.core.seeds import order

MAX_DEPARTURE = 125  # thousandths of a step's tokens that may lie in other octaves of cost than the mix has them
_ENOUGH = 995  # thousandths: no more runs once the dearest items allow this balance
_RUNS = (0, 1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24)  # items of a step that are dealt in runs, in sixteenths of its slots
_STEPS, _SLOTS = (1 << 33) + np.arange(2)  # streams of this module's hashes
_NEIGHBOURS = 4  # cheap slots that a dear slot tries to swap with
_ROUNDS = 6
_CLOSE = 1004  # thousandths of the mean cost: slots up to here are left alone


def pack(
    tokens: np.ndarray, costs: np.ndarray, slots: int, max_tokens: int, fill: float, seed: int
) -> list[list[list[int]]]:
    """Deal all items to the fewest steps of `slots` packs under `max_tokens` that `fill` allows.

    Returns the items of each slot of each step. Cost must not fall as tokens rise; no item may exceed `max_tokens`.
    """
    costs = costs // (1 + int(costs.max()) // 2**31)  # sums over a window stay far inside 64 bits
    count = max(1, -(-int(tokens.sum()) // max(1, int(slots * max_tokens * fill))))
    by_cost = np.lexsort((np.arange(len(costs)), -costs))
    sizes, prices = tokens.tolist(), costs.tolist()
    while True:
        step_of = _deal_to_steps(tokens, costs, by_cost, count, slots)
        steps: list[list[list[int]]] = []
        left: list[int] = []
        for step in order(seed, _STEPS, np.arange(count)).tolist():
            items = by_cost[step_of[by_cost] == step].tolist()
            items = sorted(items + left, key=lambda i: (-prices[i], i)) if left else items
            slots_of_step, left = _deal_to_slots(items, sizes, prices, slots, max_tokens)
            steps.append(slots_of_step)
        if not left:
            break
        count += 1
    shuffled = [order(seed, _SLOTS, step, np.arange(slots)).tolist() for step in range(count)]
    return [[step[slot] for slot in places] for step, places in zip(steps, shuffled, strict=True) if any(step)]


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


def _deal_to_steps(tokens: np.ndarray, costs: np.ndarray, by_cost: np.ndarray, count: int, slots: int) -> np.ndarray:
    """The step of each item: with the shortest runs of dear items that let the slots of a step be equal."""
    best, best_bound = None, -1
    for sixteenths in _RUNS if count > 1 else _RUNS[:1]:
        step_of = _in_blocks(tokens, by_cost, count, sixteenths * slots // 16)
        bound = _bound(costs, step_of, count, slots)
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


def _bound(costs: np.ndarray, step_of: np.ndarray, count: int, slots: int) -> int:
    """Thousandths of balance (mean over max cost of a step's slots, averaged over steps) that no packing can pass:
    the dearest slot costs at least as much as the dearest item."""
    total, dearest = np.zeros((2, count), dtype=np.int64)
    np.add.at(total, step_of, costs)
    np.maximum.at(dearest, step_of, costs)
    return int((1000 * total // np.maximum(np.maximum(total, slots * dearest), 1)).sum()) // count


def _deal_to_slots(
    items: list[int], tokens: list[int], costs: list[int], slots: int, max_tokens: int
) -> tuple[list[list[int]], list[int]]:
    """Each item (dearest first) to the cheapest slot with room; returns the slots, and the items that found none."""
    packs: list[list[int]] = [[] for _ in range(slots)]
    room, load = [max_tokens] * slots, [0] * slots
    cheapest = [(0, slot) for slot in range(slots)]
    parked: list[tuple[int, int]] = []  # slots that had no room for an earlier, larger item: (-room, slot)
    left = []
    for item in items:
        size = tokens[item]
        while parked and -parked[0][0] >= size:
            slot = heappop(parked)[1]
            heappush(cheapest, (load[slot], slot))
        while cheapest and room[cheapest[0][1]] < size:
            slot = heappop(cheapest)[1]
            heappush(parked, (-room[slot], slot))
        if not cheapest:
            left.append(item)
            continue
        slot = cheapest[0][1]
        packs[slot].append(item)
        room[slot] -= size
        load[slot] += costs[item]
        heapreplace(cheapest, (load[slot], slot))
    _even_out(packs, room, load, tokens, costs)
    return packs, left


def _even_out(packs: list[list[int]], room: list[int], load: list[int], tokens: list[int], costs: list[int]) -> None:
    """Move or swap items between the dearest and the cheapest slots while that lowers the dearer of the two."""
    close = sum(load) * _CLOSE // (1000 * len(packs))
    for _ in range(_ROUNDS):
        ranked = sorted(range(len(packs)), key=lambda s: (-load[s], s))
        if load[ranked[0]] <= close:
            return
        changed = False
        for dear in ranked:
            if load[dear] <= close:
                break
            best = min((_best_swap(dear, cheap, packs, room, load, tokens, costs=costs)
                        for cheap in ranked[-_NEIGHBOURS:] if load[cheap] < load[dear]), default=None)  # fmt: skip
            if best is None or best[0] >= load[dear]:
                continue
            _, cheap, give, take = best
            packs[dear].remove(give)
            packs[cheap].append(give)
            moved, size = costs[give], tokens[give]
            if take >= 0:
                packs[cheap].remove(take)
                packs[dear].append(take)
                moved, size = moved - costs[take], size - tokens[take]
            load[dear], load[cheap] = load[dear] - moved, load[cheap] + moved
            room[dear], room[cheap] = room[dear] + size, room[cheap] - size
            changed = True
        if not changed:
            return


def _best_swap(
    dear: int,
    cheap: int,
    packs: list[list[int]],
    room: list[int],
    load: list[int],
    tokens: list[int],
    *,
    costs: list[int],
) -> tuple[int, int, int, int]:
    """The dearer load after the best swap, the other slot, what to give, and what to take for it (-1: nothing)."""
    best = (load[dear], cheap, -1, -1)
    gap, free, back = load[dear] - load[cheap], room[cheap], room[dear]
    for give in packs[dear]:
        cost, size = costs[give], tokens[give]
        for take in (-1, *packs[cheap]):
            moved, grown = (cost, size) if take < 0 else (cost - costs[take], size - tokens[take])
            if 0 < moved < gap and -back <= grown <= free:
                worse = max(load[dear] - moved, load[cheap] + moved)
                if worse < best[0]:
                    best = (worse, cheap, give, take)
    return best
