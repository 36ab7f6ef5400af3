"""Runs under other launchers, through a suspension, after a long history, and in another plan than they began in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytestmark = [pytest.mark.campaign, pytest.mark.timeout(3600)]  # a minute each, but not on a busy machine


def test_ranks_that_stood_still_for_longer_than_the_time_out_end_bitwise_as_if_they_had_not(
    runs: Callable[[str], Any],
) -> None:
    found = runs("suspended")
    assert found["code"] == 0 and found["differing"] == []
    assert found["stopped"] >= 6 and found["moved"] == 0 and 5 <= found["reached"] < 20, "in the middle, all of them"


def test_a_resume_after_a_million_lines_starts_as_fast_as_a_fresh_run(runs: Callable[[str], Any]) -> None:
    spent = {name: min(seconds) for name, seconds in runs("long history").items()}
    assert spent["long"] < 1.1 * spent["fresh"], spent


def test_a_run_in_another_plan_visits_what_is_left_of_the_epoch(runs: Callable[[str], Any]) -> None:
    found = runs("other plan")
    slots, shards = found["slots"], found["shards"]
    assert (slots["code"], shards["code"], slots["windows"]) == (0, 0, 2)
    assert len(slots["seen"]) == 16 and len(shards["seen"]) == 24, "every sample of the epoch"
    assert max(times for _, times in slots["seen"]) == 2, "the window that was begun is taken again, the first isn't"
    assert "at the beginning of window 1 of epoch 0; the 1 step(s) taken of it" in slots["said"][0]
    assert "at the beginning of epoch 0, as its shards are others" in shards["said"][0]


def test_other_launchers_start_joint_training_or_are_refused(runs: Callable[[str], Any]) -> None:
    found = runs("launchers")
    expected = None
    for name in ("deepspeed", "accelerate", "RANK and WORLD_SIZE"):
        one = found[name]
        assert set(one["codes"]) == {0}, one["said"]
        assert list(one["ledgers"]) == ["rank-0", "rank-1"]
        steps = [set(ledger) for ledger in one["ledgers"].values()]
        assert steps == [{"1", "2"}] * 2, "each step once on each rank"
        expected = expected or one["ledgers"]
        assert one["ledgers"] == expected, "the same samples, shared out alike"
    alone = found["accelerate on CPU"]
    assert set(alone["codes"]) != {0} and alone["ledgers"] == {}
    assert len(alone["errors"]) == 1 and "accelerate started one process" in alone["errors"][0]
