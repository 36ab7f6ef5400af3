"""A full disk: a stop whose save fails is to be given again, and a start that could keep nothing says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


@pytest.mark.timeout(1800)  # half a minute, but not on a busy machine
def test_a_full_disk_is_said_and_the_run_goes_on_once_there_is_room(runs: Callable[[str], Any]) -> None:
    found = runs("full disk")
    stopped, started, barred, last = found["ends"]
    assert stopped == [75, "stopped by SIGTERM, but its checkpoint could not be written"]
    assert started[0] == 2 and started[1].startswith("no room for a checkpoint: 0.00 GiB free in ")
    assert barred[0] == 2 and "starts.json can't be used: No space left on device; make room" in barred[1]
    assert last == [0, "done"] and found["steps"] == list(range(1, 11))
    assert "resumed step-00000004" in found["output"] and "Traceback" not in found["output"]
