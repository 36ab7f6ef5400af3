"""Signals are remembered, and too many bad samples are a stop that says why."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from sora_train.core.cli import InputError
from sora_train.training.health.guard import SIGNALS, BadShare, Guard


@pytest.fixture
def guard() -> Iterator[Guard]:
    before = {number: signal.signal(number, signal.SIG_DFL) for number in SIGNALS}  # under nohup, one is ignored
    yield Guard()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_remembered_by_name(guard: Guard, number: signal.Signals) -> None:
    assert not guard.wants_stop
    os.kill(os.getpid(), number)
    assert guard.wants_stop and guard.received == number.name


def test_a_second_interrupt_stops_at_once_and_a_second_term_does_not(guard: Guard) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_a_share_under_the_limit_goes_on_for_ever() -> None:
    bad = BadShare(0.2)
    for _ in range(300):
        bad.add(8, 2, {"checksum": 2})
    with pytest.raises(InputError, match="of the last 1000 samples"):  # and is still watched
        for _ in range(300):
            bad.add(7, 3, {"checksum": 3})


def test_a_share_over_the_limit_stops_and_names_the_causes() -> None:
    bad = BadShare(0.2)
    with pytest.raises(InputError) as caught:
        for _ in range(50):
            bad.add(7, 3, {"timeout": 5, "checksum": 20, "short": 1, "crash": 2})
    assert "30 of the last 100 samples" in str(caught.value)
    assert "checksum 20, timeout 5, crash 2;" in str(caught.value)
    assert "data.max_bad_fraction=0.2" in str(caught.value)


def test_a_few_samples_are_no_share() -> None:
    bad = BadShare(0.2)
    for _ in range(9):
        bad.add(0, 10, {"missing": 10})
    with pytest.raises(InputError, match="90|100 of the last 100"):
        bad.add(0, 10, {"missing": 10})


def test_only_the_last_thousand_samples_count() -> None:
    bad = BadShare(0.2)
    for _ in range(1000):
        bad.add(100, 0, {})
    with pytest.raises(InputError, match="300 of the last 1000"):
        for _ in range(10):
            bad.add(0, 100, {"missing": 100})


def test_good_samples_of_long_ago_excuse_nothing() -> None:
    bad = BadShare(0.2)
    for _ in range(100):
        bad.add(100, 0, {})
    with pytest.raises(InputError, match="300 of the last 1000 samples"):
        for _ in range(3):
            bad.add(0, 100, {})
