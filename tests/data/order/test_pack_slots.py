"""Packs of several slots: clips that outweigh a slot are shared by its neighbours, others are not."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from sora_train.core.cost import Seconds
from sora_train.core.seeds import below, uniform
from sora_train.core.world import World
from sora_train.data.loader import Sharing, passes_of_rank
from sora_train.data.order.packing import departure, pack, spans

SLOTS = 64


def loads_of(step: list[list[int]], costs: np.ndarray, most: int) -> np.ndarray:
    """The load of each slot: its pack's cost over the slots that the pack takes."""
    return np.array([costs[step[first]].sum() / width for first, width in spans(step, most)])


def balance(steps: list[list[list[int]]], costs: np.ndarray, most: int) -> float:
    loads = np.array([loads_of(step, costs, most) for step in steps])
    return float((loads.mean(1) / loads.max(1)).mean())


@pytest.mark.parametrize(("cap", "wanted"), [(2.0, 0.98), (1.0, 0.98), (0.5, 0.97)])
def test_long_clips_over_several_slots_leave_balance_and_mix_whole(cap: float, wanted: float) -> None:
    """Where the dearest clip outweighs a slot of the mean cost, and others don't."""
    longest, n = 172_000, np.arange(4096)
    tokens = np.maximum(longest * (0.02 + 0.98 * uniform(7, n) ** 3), 1).astype(np.int64)
    costs = 24 * 3072 * tokens + 4 * tokens**2
    shared = pack(tokens, costs, SLOTS, int(cap * longest), 0.8, 1, most=8)
    assert balance(shared, costs, 8) >= wanted
    if cap == 1.0:
        assert balance(pack(tokens, costs, SLOTS, longest, 0.8, 1), costs, 1) < 0.97
    number = np.empty(len(n), dtype=np.int64)
    for step, slots in enumerate(shared):
        for slot in slots:
            number[slot] = step
    assert departure(tokens, costs, number, len(shared)).max() <= 150
    assert sorted(item for step in shared for slot in step for item in slot) == n.tolist()
    widths = [width for step in shared for _, width in spans(step, 8)]
    assert {1, 2} <= set(widths)


def test_a_clip_of_more_tokens_than_a_slot_gets_the_slots_that_hold_it() -> None:
    tokens = np.array([70, 30, 10, 10, 10, 10, 10, 10])
    (step,) = pack(tokens, tokens, 4, 40, 1.0, 1, most=4)
    assert spans(step, 4) == [(0, 2), (0, 2), (2, 1), (3, 1)]
    assert 0 in step[0] and step[1] == []
    assert [int(tokens[slot].sum()) for slot in step] == [80, 0, 40, 40]


def test_the_part_that_each_rank_has_anew_is_not_divided() -> None:
    """Where a slot's fair load is 60, a clip of 120 takes two slots; but four, if 80 of it are each rank's own."""
    tokens = np.array([120, *[40] * 9])
    for undivided, wanted in ((0 * tokens, 2), (tokens // 3 * 2, 4)):
        (step,) = pack(tokens, tokens, 8, 200, 1.0, 1, most=4, undivided=undivided)
        first = next(slot for slot, items in enumerate(step) if 0 in items)
        assert spans(step, 4)[first] == (first, wanted)
    cost = Seconds(per_pack=1, per_clip=2, per_token=30, per_pair=1, per_pixel=5)
    assert cost.undivided(10, 7) == 2 + 35 and cost.of_clips(10, 7) == 37 + 300 + 100
    assert cost.of_pack([10, 10], [7, 7]) == 1 + 2 * 437 and cost.of_pack([10, 10], [7, 7], 4) == 1 + 2 * 37 + 200


def test_no_library_changes_a_plan_of_shared_packs() -> None:
    """By value: the same steps on every machine and with every version of everything."""
    tokens = below(900, 5, np.arange(500)) ** 2 // 300 + 30
    steps = pack(tokens, 1000 * tokens + 2 * tokens**2, 16, 2000, 0.9, 3, most=8)
    assert [len(step) for step in steps] == [16] * len(steps)
    assert hashlib.sha256(json.dumps(steps).encode()).hexdigest()[:16] == "9e78e9661fd1b16a"


def test_spans_are_aligned_powers_of_two_over_empty_slots() -> None:
    full, none = [1], list[int]()
    assert spans([full, none, full, none], 2) == [(0, 2), (0, 2), (2, 2), (2, 2)]
    assert spans([full, none, none, full], 4) == [(0, 2), (0, 2), (2, 1), (3, 1)]
    assert spans([full, none, none, none], 2) == [(0, 2), (0, 2), (2, 1), (3, 1)]
    assert spans([full, none, none, none, none, full], 8) == [(0, 4)] * 4 + [(4, 1), (5, 1)]
    assert spans([full, full, none], 2) == [(0, 1), (1, 1), (2, 1)], "no pack begins in the middle of two slots"


@hypothesis_settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(1, 400), min_size=1, max_size=120),
    st.integers(8, 19),
    st.sampled_from([2, 4, 8]),
    st.floats(0.3, 1.0),
    st.integers(0, 2**64 - 1),
)
def test_every_item_is_packed_once_and_every_pack_fits_its_slots(
    sizes: list[int], slots: int, most: int, fill: float, seed: int
) -> None:
    tokens = np.array(sizes, dtype=np.int64)
    cap = max(100, -(-max(sizes) // most))
    steps = pack(tokens, 7 * tokens + tokens**2, slots, cap, fill, seed, most=most)
    assert sorted(item for step in steps for slot in step for item in slot) == list(range(len(sizes)))
    for step in steps:
        assert len(step) == slots
        assert all(sum(sizes[i] for i in step[first]) <= width * cap for first, width in spans(step, most))
        assert sum(1 / width for _, width in spans(step, most)) == len({first for first, _ in spans(step, most)})


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 8, 16, 1024])
@pytest.mark.parametrize("on_a_machine", [4, 8])
def test_the_ranks_together_compute_every_pack_once(ranks: int, on_a_machine: int) -> None:
    """At any number of ranks: each pack in one pass, by a group of neighbours on one machine, part by part."""
    local = min(ranks, on_a_machine)
    if ranks % local:
        local = 1
    sharing = Sharing(most=World(size=ranks, local_size=local).sharing(8))
    assert sharing.most == {1: 1, 2: 2, 3: 1, 4: 4, 6: 2, 8: 8}[local]
    slots = 32
    packs = [[1], *[[]] * 7, [1], *[[]] * 3, [1], [], *([1] for _ in range(slots - 14))]
    found: dict[int, list[tuple[int, int, tuple[int, int]]]] = {}
    for rank in range(ranks):
        passes = passes_of_rank(slots, rank, ranks, None)
        for number, passed in enumerate(passes):
            taken, part = sharing.of(passed, spans(packs, 8))
            for slot in taken:
                found.setdefault(slot, []).append((number, rank, part))
    assert sorted(slot for slot in found if packs[slot]) == [n for n, items in enumerate(packs) if items]
    for slot, holders in found.items():
        numbers, places, parts = zip(*holders, strict=True)
        assert len(set(numbers)) == 1 and places == tuple(range(places[0], places[0] + len(places)))
        assert parts == tuple((n, len(parts)) for n in range(len(parts))), (slot, holders)
        assert places[0] // local == places[-1] // local and places[0] % len(places) == 0
    assert max(len(holders) for holders in found.values()) == min(8, sharing.most)
