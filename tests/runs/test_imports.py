"""A checkpoint of DeepSpeed's own, made by two ranks at each stage, is read to the bit, and a run goes on from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


@pytest.mark.campaign
@pytest.mark.timeout(3600)  # a quarter of a minute, but not on a busy machine
def test_deepspeeds_own_checkpoints_are_taken_over(runs: Callable[[str], Any]) -> None:
    found = runs("imports")
    for name, stage in (("1", 1), ("2", 2), ("3", 3), ("1-bf16", 1)):
        saved = found["saved"][name]
        assert saved["wrong"] == [] and saved["count"] > 60, name
        assert saved["about"] == [3, 3, 2, stage], name
    code, output, errors = found["command"]
    told = output.splitlines()[-1]
    assert code == 0 and told.startswith("step 3: ") and "from 2 rank(s) at ZeRO stage 3" in told, errors
    assert found["code"] == 0 and "resumed step-00000003" in found["output"], found["output"]
    assert sorted(found["losses"]) == ["4", "5"]
