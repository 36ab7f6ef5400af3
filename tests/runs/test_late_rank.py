"""A rank that is slow for a step costs the others that time, and no more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.runs.late_rank import EVERY, PAUSE_S, SLOWER, costs


def test_the_cost_of_a_late_rank_by_value() -> None:
    """Both take 1 s, then 0.1 s together; in the tenth step the other takes 0.3 s longer, or it hits twice as hard."""
    for hits in (1.0, 2.0):
        mine, late, now = [], [], 0.0
        for number in range(40):
            slower = 0.3 if number % EVERY == EVERY - 1 else 0.0
            mine.append((now, now + 1.0))
            late.append((now, now + 1.0 + slower))
            now += 1.1 + hits * slower
        found = costs(mine, late)
        wanted = {"late": 0.3, "lost": hits * 0.3, "more": (hits - 1) * 0.3, "after": 0.0, "noise": 0.0}
        assert found == pytest.approx(wanted, abs=1e-9)


@pytest.mark.campaign  # judges times: only a quiet machine gives a verdict
@pytest.mark.timeout(1800)
def test_the_others_lose_no_more_than_a_slow_step_takes_longer(runs: Callable[[str], Any]) -> None:
    found = runs("late rank")
    for name, cost in found.items():
        print(f"{name}: {cost}")
        assert cost["late"] > 0.5 * PAUSE_S * SLOWER, name
        assert max(cost["more"], cost["after"]) <= max(cost["noise"], 0.1 * cost["late"]), name
