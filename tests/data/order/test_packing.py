"""Packing: every item once under the cap, slots of a step that cost the same, steps that keep the mix."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from sora_train.core.seeds import below, uniform
from sora_train.data.order.packing import MAX_DEPARTURE, departure, pack

SLOTS = 64


def clips(longest: int, count: int = 4096) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and costs of a mix whose dearest clip costs twenty times the usual one."""
    n = np.arange(count)
    tokens = np.maximum(longest * (0.02 + 0.98 * uniform(7, n) ** 3), 1).astype(np.int64)
    return tokens, 24 * 3072 * tokens + 4 * tokens**2


def balance(steps: list[list[list[int]]], costs: np.ndarray) -> float:
    loads = np.array([[costs[slot].sum() for slot in step] for step in steps])
    return float((loads.mean(1) / loads.max(1)).mean())


def step_numbers(steps: list[list[list[int]]], count: int) -> np.ndarray:
    number = np.empty(count, dtype=np.int64)
    for n, step in enumerate(steps):
        for slot in step:
            number[slot] = n
    return number


@pytest.mark.parametrize(("longest", "cap", "wanted"), [(21_600, 2, 0.97), (76_000, 2, 0.97), (172_000, 4, 0.99)])
def test_slots_cost_the_same_and_steps_keep_the_mix(longest: int, cap: int, wanted: float) -> None:
    tokens, costs = clips(longest)
    steps = pack(tokens, costs, SLOTS, cap * longest, 0.9, 1)
    assert balance(steps, costs) >= wanted
    assert departure(tokens, costs, step_numbers(steps, len(tokens)), len(steps)).max() <= 150


def test_departure_is_the_distance_of_token_shares() -> None:
    tokens, costs = np.array([10, 10, 10, 10]), np.array([1, 1, 8, 8])
    assert departure(tokens, costs, np.array([0, 1, 0, 1]), 2).tolist() == [0, 0]
    assert departure(tokens, costs, np.array([0, 0, 1, 1]), 2).tolist() == [500, 500]
    one_octave = np.array([1, 4, 5, 7])
    assert departure(tokens, one_octave, np.array([0, 1, 1, 1]), 2).tolist() == [750, 250]


def test_runs_of_dear_clips_help_where_one_would_outweigh_a_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, costs = clips(172_000)
    with_runs = pack(tokens, costs, SLOTS, 172_000, 0.9, 1)
    assert MAX_DEPARTURE <= 150
    monkeypatch.setattr("sora_train.data.order.packing._RUNS", (0,))
    without = pack(tokens, costs, SLOTS, 172_000, 0.9, 1)
    assert balance(with_runs, costs) > balance(without, costs) + 0.05


def test_swaps_even_out_what_dealing_leaves() -> None:
    """Dearest first alone ends at 9 and 11 here: 5 + 4, and 5 + 3 + 3."""
    tokens = np.array([5, 5, 4, 3, 3])
    (step,) = pack(tokens, tokens, 2, 12, 1.0, 1)
    assert [int(tokens[slot].sum()) for slot in step] == [10, 10]
    (step,) = pack(tokens, tokens, 2, 11, 1.0, 1)
    assert sorted(sorted(tokens[slot].tolist()) for slot in step) == [[3, 3, 4], [5, 5]]


def test_no_library_changes_a_plan() -> None:
    """By value: the same steps on every machine and with every version of everything."""
    tokens = below(900, 5, np.arange(500)) + 30
    steps = pack(tokens, 1000 * tokens + 2 * tokens**2, 8, 2000, 0.9, 3)
    assert [len(step) for step in steps] == [8] * len(steps)
    assert hashlib.sha256(json.dumps(steps).encode()).hexdigest()[:16] == "6927b89efa09cd8a"


@hypothesis_settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(1, 100), min_size=1, max_size=120),
    st.integers(1, 9),
    st.integers(100, 300),
    st.floats(0.3, 1.0),
    st.integers(0, 2**64 - 1),
)
def test_packing_loses_nothing_and_keeps_every_slot_under_the_cap(
    sizes: list[int], slots: int, cap: int, fill: float, seed: int
) -> None:
    tokens = np.array(sizes, dtype=np.int64)
    steps = pack(tokens, 7 * tokens + tokens**2, slots, cap, fill, seed)
    assert sorted(item for step in steps for slot in step for item in slot) == list(range(len(sizes)))
    assert all(len(step) == slots and any(step) for step in steps)
    assert max(sum(sizes[i] for i in slot) for step in steps for slot in step) <= cap
    assert steps == pack(tokens, 7 * tokens + tokens**2, slots, cap, fill, seed)


def test_enormous_costs_stay_inside_64_bits() -> None:
    tokens = np.full(600, 1_000_000, dtype=np.int64)
    steps = pack(tokens, 10**18 + 0 * tokens, 100, 3_000_000, 1.0, 0)
    assert [sorted({len(slot) for slot in step}) for step in steps] == [[3], [3]]
