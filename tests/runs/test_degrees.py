"""Real runs whose packs each have their own number of ranks: one rank's losses, bit by bit when resumed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.runs.degrees import FRAMES, LONGEST


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", ["degrees", pytest.param("degrees of four", marks=pytest.mark.campaign)])
def test_packs_of_several_slots_train_as_on_one_rank_and_resume_exactly(runs: Callable[[str], Any], kind: str) -> None:
    found = runs(kind)
    assert [1, 4] in found["widths"], "in one step a pack takes four slots, another one"
    one = found["figures"]["one"]
    assert len(one["loss"]) == 4 and len(one["validation_loss"]) == 2 and len(set(one["loss"])) == 4
    for name in ("many", "moved"):
        for figure, values in found["figures"][name].items():
            assert values == pytest.approx(one[figure], rel=1e-5), (name, figure)
        assert found["samples"][name] == found["samples"]["one"]
    assert found["differing"] == []


@pytest.mark.timeout(1800)
def test_a_clip_that_fails_on_one_of_its_ranks_is_left_out_on_all(runs: Callable[[str], Any]) -> None:
    found = runs("failing part")
    one, four = found["figures"]["one"], found["figures"]["four"]
    assert one["skipped_samples"][-1] == 1 and one["samples"][-1] == len(FRAMES) - 1
    for figure, values in four.items():
        assert values == pytest.approx(one[figure], rel=1e-5), figure
    assert found["samples"]["four"] == found["samples"]["one"]
    assert [line["key"] for line in found["refused"]["four"]] == [f"{LONGEST:04d}"]
