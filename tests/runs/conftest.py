"""How the tests here have real runs made, and a checkout in which the quickstart's commands were given."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.checkout import Checkout
from tests.documented import as_run, sessions

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[str]]:
    """The process that makes real runs, see worker.py."""
    folder = tmp_path_factory.mktemp("server")
    with (
        (folder / "log").open("w") as log,
        subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("worker.py")), str(folder)],
            cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
        ) as process,
    ):  # fmt: skip
        yield process
        process.kill()  # what it forked ends with it


@pytest.fixture
def runs(server: subprocess.Popen[str], tmp_path: Path, corpus: list[str]) -> Callable[[str], Any]:
    """Have the server make the runs of a kind on the H.264 corpus, and return what came of them."""

    def make(kind: str) -> Any:
        folder = tmp_path / "bed"
        assert server.stdin and server.stdout
        print(json.dumps({"kind": kind, "folder": str(folder), "shards": corpus}), file=server.stdin, flush=True)
        said = next(line for line in server.stdout if line.startswith("ended with "))
        assert said == "ended with 0\n", f"{said}: {(tmp_path / 'bed.log').read_text()[-6000:]}"
        return json.loads((tmp_path / "bed.json").read_text())

    return make


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkout, dict[str, str]]:
    """A checkout after the commands of docs/quickstart.md, and what each of them printed."""
    checkout = Checkout(tmp_path_factory.mktemp("quickstart") / "sora_train")
    (commands,) = [given for given in sessions(ROOT / "docs/quickstart.md") if "./launch/setup.sh" in given]
    return checkout, {command: checkout.give(as_run(command)) for command in commands}
