"""Intervals against known values and by their coverage."""

from __future__ import annotations

import numpy as np
import pytest

from sora_train.evaluation.intervals import estimate, paired_difference, wilson


def test_wilson_interval() -> None:
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="11 successes of 10"):
        wilson(11, 10)


def test_the_interval_holds_the_median_and_narrows_with_more_values() -> None:
    rng = np.random.default_rng(3)
    few, many = (estimate(rng.normal(5, 1, n).tolist(), "median") for n in (20, 2000))
    assert few.low <= few.value <= few.high and many.low <= many.value <= many.high
    assert many.high - many.low < 0.3 * (few.high - few.low) and many.low < 5 < many.high
    assert estimate([1.0, float("nan")], "median").value == 1.0 and estimate([1.0, float("nan")], "mean").n == 1
    assert estimate([], "mean").n == 0 and np.isnan(estimate([], "mean").value)


@pytest.mark.parametrize("summary", ["mean", "median"])
def test_intervals_hold_the_truth_about_as_often_as_they_say(summary: str) -> None:
    rng = np.random.default_rng(0)
    held = [(e := estimate(rng.normal(2, 1, 60).tolist(), summary)).low <= 2 <= e.high for _ in range(100)]  # type: ignore[arg-type]
    assert np.mean(held) >= 0.88


def test_a_paired_difference_is_sharper_than_two_intervals() -> None:
    """The clips differ among themselves far more than the two models do."""
    rng = np.random.default_rng(1)
    clips = rng.normal(0, 10, 50)
    ours, theirs = clips + 1.0 + rng.normal(0, 0.2, 50), clips + rng.normal(0, 0.2, 50)
    found = paired_difference(ours.tolist(), theirs.tolist())
    assert 0.8 < found.low < found.value < found.high < 1.2 and found.n == 50
    alone = estimate(ours.tolist(), "mean")
    assert alone.low < float(np.mean(theirs)) < alone.high, "unpaired, nobody could tell"
    with pytest.raises(ValueError, match="broadcast|shape"):
        paired_difference([1.0, 2.0], [1.0, 2.0, 3.0])
