"""A guard refuses a prompt of several ranks: none of them makes it, it is recorded once, and the others are made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


@pytest.mark.timeout(1800)
def test_ranks_agree_on_a_refusal(runs: Callable[[str], Any]) -> None:
    found = runs("refusals")
    assert 2 in found["codes"] and set(found["codes"]) <= {2, -15}, found["output"]  # the first ends the other
    assert found["made"] == ["0001.mp4"], found["output"]
    assert [entry["category"] for entry in found["refused"]] == ["tea"] and "teapot" not in str(found["refused"])
