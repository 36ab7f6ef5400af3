"""Charts: extremes that are theirs, and names that are only text."""

from __future__ import annotations

import numpy as np

from sora_train.core.charts import curve_chart, histogram


def test_a_histogram_of_one_value_or_none_is_no_error() -> None:
    assert histogram("x", np.array([3.0, 3.0])).count("<rect") == 24
    assert "<p>none</p>" in histogram("x", np.array([])) and "<rect" not in histogram("x", np.array([]))


def test_curves_share_their_axes_and_leave_out_what_is_not_finite() -> None:
    chart = curve_chart("<loss>", [("red", [(1, 2.0), (3, float("nan")), (5, 4.0)]), ("blue", [(3, 1.0)])])
    assert "&lt;loss&gt;" in chart and "<loss>" not in chart
    assert 'points="8.0,56.7 412.0,20.0"' not in chart, "the lowest value is of the other curve"
    assert 'stroke="red" stroke-width=1.6 points="8.0,120.0 412.0,20.0"' in chart
    assert 'stroke="blue" stroke-width=1.6 points="210.0,170.0"' in chart
    assert ">4</text>" in chart and ">1</text>" in chart and ">step 5</text>" in chart
    assert curve_chart("x", [("red", [(1, float("inf"))])]) == ""
