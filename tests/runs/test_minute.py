"""A whole minute of video in one clip, trained in full attention over four ranks as on one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


@pytest.mark.campaign
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("kind", "tokens"), [("minute", 721 * 4), ("large minute", 721 * 16)])
def test_a_minute_over_four_ranks_trains_as_on_one(runs: Callable[[str], Any], kind: str, tokens: int) -> None:
    """1,441 frames are 721 latent frames of the demo's VAE; the second update sees the first's weights."""
    found = runs(kind)
    one, four = found["1"], found["4"]
    assert [line["tokens"] for line in one] == [line["tokens"] for line in four] == [tokens, 2 * tokens]
    for name in ("loss", "grad_norm"):
        assert [line[name] for line in four] == pytest.approx([line[name] for line in one], rel=1e-5), name
    assert one[0]["loss"] != one[1]["loss"]
