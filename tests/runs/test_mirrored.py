"""A run whose machines are lost goes on from its mirror, and what is left of the old one writes there no more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


@pytest.mark.campaign
@pytest.mark.timeout(3600)  # half a minute, but not on a busy machine
def test_a_run_goes_on_elsewhere_from_its_mirror(runs: Callable[[str], Any]) -> None:
    found = runs("mirrored")
    held = ["config.yaml", "inputs.json", "run.json", "snapshots", "step-00000018", "step-00000020"]
    assert found["held"] == found["held again"] == held and found["same"]
    assert found["codes"] == [0, 2]
    assert found["refused"].endswith("choose another mirror, or null")
    assert found["failed"] and set(found["failed"]) == {0}
    ours, theirs = found["samples"]
    assert ours == theirs and sorted(ours) == ["19", "20"]
    ours, theirs = found["averages"]
    assert ours == pytest.approx(theirs, rel=1e-5) and ours["made"] == pytest.approx(ours["ema-0.1"], rel=1e-5)
    assert len({ours["ema"], ours["ema-0.05"], ours["ema-0.1"]}) == 3
    ours, theirs = found["losses"]
    assert ours == pytest.approx({step: theirs[step] for step in ours}, rel=1e-5) and sorted(ours) == ["19", "20"]
    every = [f"step-{step:08d}" for step in (4, 8, 12, 16, 20)]
    assert found["snapshots"] == [every, every, every]
    code, output, errors, whole, off = found["exported"]
    assert code == 0 and whole and off < 1e-5, errors
    assert "the average of length 0.1 at step 20; its weighting is met to 0.00%" in output
