"""Shards that footage was made into train: 20 steps, and the same losses where the run is killed and given again."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.data_tools.curation import films

ROOT = Path(__file__).parents[3]
pytestmark = [pytest.mark.campaign, pytest.mark.timeout(600)]
_RUNS = """
import signal, sys, time
from pathlib import Path
from tests.faults.bed import Bed, Job
bed = Bed(Path(sys.argv[1]), 20, sys.argv[2:])
assert Job(bed.config("whole"), 1).wait() == 0, bed.run_dir("whole").with_suffix(".out").read_text()
job, log = Job(bed.config("parts"), 1), bed.run_dir("parts") / "metrics.jsonl"
while not job.poll() and not (log.is_file() and len(log.read_bytes().splitlines()) > 10):
    time.sleep(0.01)
assert not job.codes, "it ended before it was killed"
job.send(signal.SIGKILL)
job.wait()
assert Job(bed.config("parts"), 1).wait() == 0
"""


def losses(run: Path) -> dict[int, float]:
    """The loss of each step that a run logged."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def test_footage_trains_and_a_run_goes_on(tmp_path: Path, curated: Callable[..., int]) -> None:
    for seed in range(6):
        films.write(tmp_path / f"raw/{seed}.mp4", films.shot(seed, 40))
        (tmp_path / f"raw/{seed}.txt").write_text(f"discs of kind {seed}")
    assert curated(tmp_path / "raw", tmp_path / "out", "captions=beside", "licence=CC0-1.0") == 0
    shards = sorted(map(str, (tmp_path / "out").glob("*.tar")))
    assert len(shards) > 1
    command = [sys.executable, "-c", _RUNS, str(tmp_path / "bed"), *shards]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    whole, parts = (losses(tmp_path / "bed" / name) for name in ("whole", "parts"))
    assert list(whole) == list(range(1, 21)) and whole == parts
