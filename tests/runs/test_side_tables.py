"""A score beside the index filters and weights real runs, and a changed one is noticed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


@pytest.mark.timeout(1800)  # half a minute, but not on a busy machine
def test_a_score_filters_and_weights_runs_of_any_ranks(runs: Callable[[str], Any]) -> None:
    found = runs("side tables")
    one, two = found["1"], found["2"]
    assert one["epochs"] > 1 and one["first epoch"] == {str(n): n % 4 for n in range(16)}
    assert one["samples"] == two["samples"] and sorted(one["samples"], key=int) == [str(n) for n in range(1, 13)]
    assert one["losses"] == pytest.approx(two["losses"], rel=1e-4)
    assert found["codes"] == [0, 2]
    assert "the data or its packing changed since the checkpoint" in found["output"]
    assert found["reason"].startswith("no side table at ") and found["reason"].endswith("check data.side_tables")
