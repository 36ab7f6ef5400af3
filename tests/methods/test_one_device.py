"""Nothing of a training step's forward pass stays on the host when the networks are elsewhere."""

from __future__ import annotations

import subprocess
import sys

from tests.methods.one_device import CASES


def test_forward_passes_stay_on_the_networks_device() -> None:
    command = [sys.executable, "-m", "tests.methods.one_device"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if " on " in line]
    assert lines == [f"{' '.join(overrides)} on gpu:0" for overrides in CASES]
