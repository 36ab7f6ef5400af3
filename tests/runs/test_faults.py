"""A sample of the fault campaign, with real ranks; `python -m benchmarks.faults` is the whole of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.faults import bound

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(3600)  # half a minute, but not on a busy machine
def test_a_sample_of_the_campaign_finds_nothing(tmp_path: Path) -> None:
    numbers = (
        "kills=1", "kills_each=1", "terms=1", "damages=24", "nans=1", "spikes=0", "hangs=0", "doubles=0", "skews=1",
        "disks=1", "elastics=0", "configs=4", "seed=1",
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.faults", *numbers, f"folder={tmp_path}"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert len([line for line in done.stdout.splitlines() if " | 0 | " in line]) == 7


def test_the_bound_of_a_rate() -> None:
    """Three divided by the number of trials, where none failed."""
    assert bound(0, 200) == pytest.approx(3 / 200, rel=0.01)
    assert bound(1, 200) == pytest.approx(0.0235, rel=0.01)
    assert bound(3, 3) == 1.0
