"""A real local Ray cluster of two workers gives the shards of the process pool, also where a worker is killed."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.data_tools.curation.outputs import SMALL, shards_of

ROOT = Path(__file__).parents[3]
pytestmark = [pytest.mark.campaign, pytest.mark.timeout(1800)]


@pytest.mark.parametrize("killed", [False, True])
def test_ray_gives_the_same_shards(killed: bool, footage: Path, out: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    command = [sys.executable, "-m", "data_tools.curate", f"videos={footage}", f"out={tmp_path / 'out'}", *SMALL]
    log = tmp_path / "log"
    with log.open("w") as file:
        started = subprocess.Popen([*command, "engine=ray", "workers=2"], cwd=ROOT, stdout=file, stderr=file)
        if killed:
            kill_a_worker(started)
        assert started.wait(timeout=900) == 0, log.read_text()
    assert shards_of(tmp_path / "out") == shards_of(out)


def kill_a_worker(started: subprocess.Popen[bytes]) -> None:
    """Kill the first worker process that works on a stage, as it is doing so."""
    until = time.monotonic() + 300
    while time.monotonic() < until and started.poll() is None:
        for process in psutil.Process(started.pid).children(recursive=True):
            try:
                name = " ".join(process.cmdline())
                if "ray::" in name and "IDLE" not in name and "Map" in name:
                    process.kill()
                    return
            except psutil.Error:  # it ended meanwhile
                continue
        time.sleep(0.02)
    raise AssertionError("no worker was seen at work")
