"""A command ends quietly where its reader has seen enough."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    lines = "from sora_train.core.cli import run\nrun(lambda: print('x' * 100000 * 10))"
    command = f'{sys.executable} -c "$0" | head -c 1'
    done = subprocess.run(["bash", "-c", command, lines], capture_output=True, text=True, cwd=ROOT, timeout=250)
    assert done.stdout == "x" and done.stderr == ""
