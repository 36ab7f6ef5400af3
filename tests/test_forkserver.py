"""A command that the fork server runs behaves as one that the interpreter runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Give = Callable[..., subprocess.CompletedProcess[str]]
SHOWN = "import sys, os; print(__name__, sys.argv[1:], sys.path[0], os.getcwd(), os.environ['SAID'], file=sys.stderr)"
SLEEPER = """
import os, signal, time
signal.signal(signal.SIGTERM, lambda number, frame: os.write(1, b"got %d\\n" % number))
print(os.getpid(), flush=True)
time.sleep(60)
"""


@pytest.fixture
def give(python: str, tmp_path: Path) -> Give:
    """Give arguments to the stand-in, in a folder of the test's own."""

    def run(*arguments: str, **more: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run([python, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=250, **more)

    return run


def test_a_module_some_code_and_a_file_run_as_by_the_interpreter(give: Give, tmp_path: Path) -> None:
    (tmp_path / "shown.py").write_text(SHOWN)
    environment = os.environ | {"SAID": "yes"}
    for arguments in (["-m", "shown"], ["-c", SHOWN], [f"{tmp_path}/shown.py"], ["-u", "-m", "shown"]):
        given = [*arguments, "a=1", "two words"]
        ours = give(*given, env=environment)
        theirs = subprocess.run([sys.executable, *given], cwd=tmp_path, capture_output=True, text=True, env=environment)
        assert theirs.returncode == 0 and (ours.returncode, ours.stdout, ours.stderr) == (0, "", theirs.stderr)
    assert give("-V").stdout == f"Python {sys.version.split()[0]}\n"


def test_exit_codes_and_errors_come_back(give: Give) -> None:
    assert give("-c", "import sys; sys.exit(75)").returncode == 75
    assert give("-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)").returncode == -signal.SIGKILL
    failed = give("-c", "import sora_train.there_is_none")
    assert failed.returncode == 1 and "No module named 'sora_train.there_is_none'" in failed.stderr
    assert give("-c", "import atexit; atexit.register(print, 'at the end'); print(input())", input="in").stdout == (
        "in\nat the end\n"
    )


def test_our_modules_are_found_by_pythonpath_and_libraries_are_there_already(give: Give, tmp_path: Path) -> None:
    (tmp_path / "other/sora_train").mkdir(parents=True)
    (tmp_path / "other/sora_train/train.py").write_text("import sys; print(__file__, 'torch' in sys.modules)")
    said = give("-m", "sora_train.train", env=os.environ | {"PYTHONPATH": f"{tmp_path}/other"}).stdout
    assert said == f"{tmp_path}/other/sora_train/train.py True\n"


def test_signals_are_passed_on_and_a_command_ends_with_its_client(python: str, tmp_path: Path) -> None:
    process = subprocess.Popen([python, "-c", SLEEPER], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    with process.stdout as output:
        pid = int(output.readline())
        assert pid != process.pid
        process.terminate()
        assert output.readline() == "got 15\n"
        process.kill()
        process.wait()
        end = time.monotonic() + 200
        while Path(f"/proc/{pid}").exists():
            assert time.monotonic() < end, "it outlived its client"
            time.sleep(0.01)
