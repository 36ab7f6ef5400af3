"""How the tests here have real runs made, and a checkout in which the quickstart's commands were given."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.checkout import Checkout
from tests.documented import as_run, sessions

ROOT = Path(__file__).parents[2]


@pytest.fixture
def runs(tmp_path: Path, corpus: list[str]) -> Callable[[str], Any]:
    """Have worker.py make the runs of a kind on the H.264 corpus, and return what it prints."""

    def make(kind: str) -> Any:
        done = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("worker.py")), kind, str(tmp_path / "bed"), *corpus],
            cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, capture_output=True,
            text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return json.loads(done.stdout.splitlines()[-1])

    return make


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkout, dict[str, str]]:
    """A checkout after the commands of docs/quickstart.md, and what each of them printed."""
    checkout = Checkout(tmp_path_factory.mktemp("quickstart") / "sora_train")
    (commands,) = [given for given in sessions(ROOT / "docs/quickstart.md") if "./launch/setup.sh" in given]
    return checkout, {command: checkout.give(as_run(command)) for command in commands}
