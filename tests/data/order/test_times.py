"""A clip's frames are those on the screen at each n / fps: never more than half a source frame from wall time."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sora_train.core.batch import Visit
from sora_train.data.order.times import available, distance, source_frames, thousandths

RATES = ("10", "12", "15", "16", "20", "24000/1001", "24", "25", "30000/1001", "30", "50", "60")


def visit(first: int, frames: int, fps: float) -> Visit:
    return Visit(0, first, frames, fps, (8, 8), (0, 0, 8, 8), "text_to_video", 0)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("fps", [8.0, 16.0, 24.0])
def test_frames_are_within_half_a_frame_of_wall_time(rate: str, fps: float) -> None:
    source = Fraction(rate)
    for first in (0, 7):
        taken = source_frames(visit(first, 200, fps), float(source))
        assert taken[0] == first
        late = [abs((number - first) / source - n / Fraction(fps)) for n, number in enumerate(taken)]
        assert max(late) <= Fraction(1, 2) / source * Fraction(1001, 1000), "a thousandth for rates of three decimals"


def test_frames_of_common_rates_at_sixteen_a_second() -> None:
    assert source_frames(visit(3, 7, 16.0), 24.0) == [3, 5, 6, 8, 9, 11, 12]
    assert source_frames(visit(0, 7, 16.0), 23.976) == [0, 1, 3, 4, 6, 7, 9]
    assert source_frames(visit(0, 6, 16.0), 10.0) == [0, 1, 1, 2, 3, 3]
    assert source_frames(visit(2, 3, 16.0), 16.0) == [2, 3, 4]
    assert source_frames(visit(0, 1, 0.0), 0.0) == [0]


def test_a_variable_rate_is_asked_by_time() -> None:
    assert source_frames(visit(4, 3, 16.0), 24.0, vfr=True) == [4.0, 5.5, 7.0]
    assert source_frames(visit(4, 3, 24.0), 24.0, vfr=True) == [4, 5, 6]


@given(st.integers(2, 5000), st.floats(0.5, 240), st.floats(0.5, 120))
def test_the_longest_clip_ends_inside_the_source_and_one_frame_more_would_not(
    frames: int, source: float, clip: float
) -> None:
    rates = thousandths(source), thousandths(clip)
    count = int(available(np.array(frames), *rates))
    assert int(distance(count - 1, *rates)) < frames <= int(distance(count, *rates))


@given(st.floats(0.5, 240), st.floats(0.5, 120))
def test_steps_from_frame_to_frame_differ_by_no_more_than_one(source: float, clip: float) -> None:
    steps = {b - a for a, b in pairwise(source_frames(visit(0, 60, clip), source))}
    assert max(steps) - min(steps) <= 1


def test_a_rate_kept_as_float32_takes_the_same_frames() -> None:
    for rate in map(Fraction, RATES):
        for fps in (8.0, 16.0, 23.976):
            both = [source_frames(visit(0, 500, fps), value) for value in (float(rate), float(np.float32(float(rate))))]
            assert both[0] == both[1]
