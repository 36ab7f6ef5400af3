"""What training computes depends neither on the number of ranks, nor on the ZeRO stage, nor on accumulation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


@pytest.mark.timeout(3600)  # under a minute, but not on a busy machine
@pytest.mark.parametrize(
    ("kind", "ways", "steps"), [("matrix", 6, 6), pytest.param("whole matrix", 24, 20, marks=pytest.mark.campaign)]
)
def test_every_way_to_share_out_a_batch_trains_alike(
    runs: Callable[[str], Any], kind: str, ways: int, steps: int
) -> None:
    found = runs(kind)
    assert len(found) == ways
    reference = found.pop("1 rank(s), stage 0, accumulation 1")
    assert sorted(map(int, reference["losses"])) == sorted(map(int, reference["samples"])) == list(range(1, steps + 1))
    assert len({tuple(samples) for samples in reference["samples"].values()}) > 1
    assert len(set(reference["losses"].values())) == steps
    for name, run in found.items():
        assert run["samples"] == reference["samples"], name
        assert run["losses"] == pytest.approx(reference["losses"], rel=1e-5), name
