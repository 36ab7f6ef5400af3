"""A sample of the campaigns of bad input and of numbers that don't go together, with real ranks.

`python -m tests.faults.bad_input` and `python -m tests.faults.shard_counts` are the whole of them.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def campaign(python: str, name: str, *numbers: str) -> str:
    done = subprocess.run(
        [python, "-m", f"tests.faults.{name}", *numbers], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    return done.stdout


@pytest.mark.timeout(3600)  # half a minute, but not on a busy machine
def test_every_kind_of_bad_input_goes_through_training_at_two_ranks(python: str, tmp_path: Path) -> None:
    numbers = ("each=1", "tars=10", "flips=12", "hard=false", "dropped=false", "samples=0", "clips=0")
    said = campaign(python, "bad_input", *numbers, f"folder={tmp_path}")
    rows = {line.split(" | ")[0]: line.split(" | ")[1:] for line in said.splitlines() if line.count(" | ") == 4}
    assert rows["playlist"] == ["1", "1", "0", "0"] and rows["pickle"] == ["1", "0", "0", "1"]
    assert rows["behind the index: one bit"] == ["2", "0", "2", "0"]
    assert rows["decoder: all crash"] == ["1", "0", "1", "0"] and rows["decoder: crash"] == ["1", "0", "0", "1"]
    assert len(rows) == 1 + 44 + 10 + 6 + 2


@pytest.mark.timeout(3600)
def test_numbers_of_shards_ranks_and_workers_that_do_not_go_together(python: str, tmp_path: Path) -> None:
    said = campaign(python, "shard_counts", "shards=1", "ranks=2", "workers=1", f"folder={tmp_path}")
    assert [line.split(" | ")[-1] for line in said.splitlines() if line.count(" | ") == 6] == ["0", "0"]


@pytest.mark.campaign
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", ["bad_input", "shard_counts"])
def test_the_whole_campaign(python: str, name: str, tmp_path: Path) -> None:
    assert " | " in campaign(python, name, f"folder={tmp_path}")  # its rows; what went wrong ends the command with 1
