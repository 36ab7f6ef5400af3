"""Runs that are killed, and runs that go on with other ranks and stages, end as if nothing had happened."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(3600)  # half a minute each, but not on a busy machine


def test_a_run_that_is_killed_again_and_again_ends_bitwise_as_one_that_is_not(runs: Callable[[str], Any]) -> None:
    """Weights, moments, averages, losses, learning rates and samples: see `tests.faults.bed.outcome`."""
    found = runs("kills")
    assert found["wrong"] is None
    assert found["torn saves"] >= 1
    assert found["compared"]["tensors"] > 100 and found["compared"]["figures"] == found["compared"]["samples"] == 8


def test_a_run_goes_on_with_other_ranks_and_stages(runs: Callable[[str], Any]) -> None:
    assert runs("moves") == {"wrong": None, "steps": 8}
