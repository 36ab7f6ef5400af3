"""How the tests here have real runs made, and a checkout in which the quickstart's commands were given."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.checkout import Checkout
from tests.documented import as_run, sessions

ROOT = Path(__file__).parents[2]


@pytest.fixture
def runs(python: str, tmp_path: Path, corpus: list[str]) -> Callable[[str], Any]:
    """Make the runs of a kind (see worker.py) on the H.264 corpus, and return what came of them."""

    def make(kind: str) -> Any:
        folder = tmp_path / "bed"
        with (tmp_path / "bed.log").open("w") as log:
            done = subprocess.run(
                [python, "-m", "tests.runs.worker", kind, str(folder), *corpus], cwd=ROOT, stdout=log, stderr=log,
                env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
        assert done.returncode == 0, (tmp_path / "bed.log").read_text()[-6000:]
        return json.loads((tmp_path / "bed.json").read_text())

    return make


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory: pytest.TempPathFactory, python: str) -> tuple[Checkout, dict[str, str]]:
    """A checkout after the commands of docs/quickstart.md, and what each of them printed.

    The fork server runs them; with `--campaign`, test_documented.py starts quickstart.sh with the interpreter.
    """
    checkout = Checkout(tmp_path_factory.mktemp("quickstart") / "sora_train", python=python)
    (commands,) = [given for given in sessions(ROOT / "docs/quickstart.md") if "./launch/setup.sh" in given]
    return checkout, {command: checkout.give(as_run(command)) for command in commands}
