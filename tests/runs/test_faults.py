"""A sample of the fault campaign, with real ranks; `python -m tests.faults.campaign` is the whole of it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.faults.results import Made, Results, bound, remarks, row
from tests.faults.soak import slope

ROOT = Path(__file__).parents[2]
SAMPLE = {  # kills and full disks have tests of their own
    "kills": 0, "terms": 1, "damages": 12, "starts": 1, "nans": 1, "hangs": 1, "doubles": 1, "skews": 1, "disks": 0,
    "configs": 1, "spikes": 0, "elastics": 0, "torchrun": 0, "seed": 1,
}  # fmt: skip
MORE = {
    "kills": 20, "terms": 16, "damages": 120, "starts": 12, "nans": 16, "hangs": 6, "doubles": 2, "skews": 6,
    "disks": 20, "configs": 60, "spikes": 1, "elastics": 1, "torchrun": 10, "seed": 2,
}  # fmt: skip


@pytest.mark.timeout(3600)  # half a minute, but not on a busy machine
@pytest.mark.parametrize("numbers", [SAMPLE, pytest.param(MORE, marks=pytest.mark.campaign)], ids=["sample", "more"])
def test_the_campaign_finds_nothing(python: str, tmp_path: Path, numbers: dict[str, int]) -> None:
    done = subprocess.run(
        [python, "-m", "tests.faults.campaign", *(f"{k}={v}" for k, v in numbers.items()),
         f"folder={tmp_path}"], cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    counts = {kind: count for kind, count in numbers.items() if count and kind not in ("torchrun", "seed")}
    lines = [line.split(" | ") for line in done.stdout.splitlines() if line.count(" | ") == 5]
    assert sorted(int(line[1]) for line in lines) == sorted(counts.values())
    assert {line[2] for line in lines} == {"0"}
    made = Results(tmp_path / "results.jsonl", numbers["seed"]).made
    assert len(made) == sum(counts.values())


def test_the_bound_of_a_rate() -> None:
    """Three divided by the number of trials, where none failed."""
    assert bound(0, 200) == pytest.approx(3 / 200, rel=0.01)
    assert bound(1, 200) == pytest.approx(0.0235, rel=0.01)
    assert bound(3, 3) == 1.0


def test_slices_of_a_campaign_add_up(tmp_path: Path) -> None:
    first = Results(tmp_path / "results.jsonl", seed=3)
    for n, cause in enumerate((None, "it broke", None)):
        facts = {"kills": 2, "torn": 1, "lost_steps": n, "recovery_s": 1.0 + n, "torchrun": n == 0}
        first.add(Made("kill", n, 3, cause, facts, 2.0, 1.0, "abc"))
    first.add(Made("kill", 0, 4, "of another seed", {}, 1.0, 1.0, "abc"))
    again = Results(tmp_path / "results.jsonl", seed=3)
    trials = again.of("kill", 10)
    assert [trial.number for trial in trials] == [0, 1, 2] and len(again.of("kill", 2)) == 2
    title, count, failures, rate, cost, found = row("kills", trials)
    assert (title, count, failures, rate, cost) == ("kills", "3", "1", f"{bound(1, 3):.2%}", "2.0 s, 1.0 s")
    assert (
        found
        == remarks(trials)
        == (
            "3 of 6 kills in a save; at most 2 steps lost; 1 through torchrun; "
            "kill to first new step: p95 3.0 s, at most 3.0 s"
        )
    )


def test_the_slope_of_what_a_soak_saw() -> None:
    """A steady rise is found through noise; a jump at one end is not a rise."""
    steady = [(float(t), 100.0 + 0.5 * t + (t % 3)) for t in range(60)]
    assert slope(steady) == pytest.approx(0.5, abs=0.05)
    assert slope([(float(t), 100.0 + 50.0 * (t < 3)) for t in range(60)]) == 0.0
    assert slope([]) == slope([(1.0, 5.0)]) == 0.0
