"""Real runs are evaluated while they train and afterwards: the same figures, whoever makes them and however often."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


@pytest.mark.timeout(1800)  # half a minute, but not on a busy machine
def test_evaluations_under_way_change_nothing_and_agree(runs: Callable[[str], Any]) -> None:
    found = runs("looks")
    assert found["changed"] == [], "weights, averages, losses and samples to the bit"
    assert found["kill"] is None
    figures = found["figures"]
    assert sorted(figures["one"]) == ["2", "4"]
    wanted = {step: every[0] for step, every in figures["one"].items()}
    assert {"evaluation/psnr_db", "evaluation/ssim", "evaluation/motion"} <= wanted["2"].keys()
    for name in ("two", "shared", "three", "killed"):
        assert figures[name].keys() == wanted.keys(), name
        for step, every in figures[name].items():
            for again in every:
                assert again == pytest.approx(wanted[step], rel=1e-3), (name, step)


@pytest.mark.timeout(1800)
def test_an_evaluation_is_the_same_on_two_ranks_and_after_a_kill(runs: Callable[[str], Any]) -> None:
    found = runs("evaluations")
    for name, one in found.items():
        assert one["codes"] == one["ends"], name
        assert one["units"] == ["unit-00000.json", "unit-00001.json"], "none was made twice"
        assert one["said"] == found["one"]["said"], name
    said = found["one"]["said"]
    assert said["videos"] == 24 and said["figures"]["psnr_db"]["columns"]["samples"]["n"] == 24
    assert said["distances"]["random_kernel"]["samples"]["n"] == 12
