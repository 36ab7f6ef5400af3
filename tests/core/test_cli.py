"""A command ends quietly where its reader has seen enough, and with a line where a text is given as a path."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sora_train.core.cli import run

ROOT = Path(__file__).parents[2]


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    lines = "from sora_train.core.cli import run\nrun(lambda: print('x' * 100000 * 10))"
    command = f'{sys.executable} -c "$0" | head -c 1'
    done = subprocess.run(["bash", "-c", command, lines], capture_output=True, text=True, cwd=ROOT, timeout=250)
    assert done.stdout == "x" and done.stderr == ""


def test_a_text_that_is_given_as_a_path_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(lambda: int(Path("a red ring " * 30).is_file()))
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        "error: 'a red ring a red ring a red ring a red r'... is too long for the name of a file; "
        "is it a text, for another option?\n"
    )
    with pytest.raises(FileNotFoundError):
        run(lambda: len(Path("nowhere").read_bytes()))
