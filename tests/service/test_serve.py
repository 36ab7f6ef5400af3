"""The command: its keys, a kill in the middle of a job, and a service with a model in a process of its own."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sora_train import serve
from sora_train.core.cli import InputError
from sora_train.core.media import read_mp4
from sora_train.release.folder import ReleaseFolder
from sora_train.release.verify import verify
from sora_train.service.database import Database
from tests.service.conftest import Client

ROOT = Path(__file__).resolve().parents[2]
Start = Callable[..., subprocess.Popen[str]]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture
def give(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Give the command; returns what it prints."""

    def go(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["serve", *arguments])
        assert serve.main() == 0
        return capsys.readouterr().out.strip()

    return go


@pytest.fixture
def started(python: str) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start processes; those that still run are killed after the test."""
    running: list[subprocess.Popen[str]] = []

    def go(*command: str) -> subprocess.Popen[str]:
        running.append(subprocess.Popen([python, *command], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True))
        return running[-1]

    yield go
    for one in running:
        if one.poll() is None:
            kill(one)


def line(process: subprocess.Popen[str], wanted: str = "") -> str:
    """The next line that holds a text."""
    assert process.stdout is not None
    while wanted not in (text := process.stdout.readline()):
        assert text, "it ended before it served"
    return text


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    assert process.stdout is not None
    process.stdout.close()


def test_keys_on_the_command_line(folder: Path, give: Callable[..., str]) -> None:
    run = f"run_dir={folder}/run"
    key = give(run, "add=ada", "seconds_per_day=12")
    assert key.startswith("sora_") and give(run, "list=true") == "ada: 0 of 12 seconds today"
    for arguments in (["add=ada"], ["revoke=bob"], ["add="], ["allow=[nowhere]"], ["tls_key=a"]):
        with pytest.raises(InputError):
            give(run, *arguments, "release=off")
    assert give(run, "revoke=ada") == "ada: revoked" and give(run, "list=true") == "ada: revoked"
    with pytest.raises(InputError, match="nothing guards, marks or signs"):
        give(run)


def test_a_killed_service_takes_its_jobs_up_again(tmp_path: Path, started: Start) -> None:
    """Killed three times in a job, at other moments each; then all jobs are there, each made once."""
    command = ("-m", "tests.service.painter", str(tmp_path))
    first = started(*command, "3600")
    client, key = Client(int(line(first))), Database(tmp_path / "service.sqlite").add_key("ada", 1e6, 1_000_000)
    ids = [client.ask(key, seed=seed) for seed in range(5)]
    for wait in (0.0, 0.3):
        while client.call("GET", f"/api/jobs/{ids[0]}", key).json["state"] != "running":
            time.sleep(0.02)
        time.sleep(wait)
        kill(first)
        first = started(*command, "3600" if wait == 0.0 else "0.2")
        client = Client(int(line(first)))
    for id in ids:
        assert client.ended(key, id)["state"] == "done"
        assert client.call("GET", f"/api/jobs/{id}/video", key).status == 200
    assert sorted(path.stem for path in (tmp_path / "outputs").iterdir()) == sorted(ids)
    attempts = {job.id: job.attempts for job in Database(tmp_path / "service.sqlite").jobs("ada")}
    assert attempts[ids[0]] == 3 and sum(attempts.values()) == 7, "the others were taken up once"


@pytest.mark.campaign
def test_a_service_with_a_model_in_a_process_of_its_own(
    folder: Path, made_folder: Path, tmp_path: Path, started: Start, give: Callable[..., str]
) -> None:  # fmt: skip
    shutil.copytree(made_folder, tmp_path / "release")
    key = give(f"run_dir={folder}/run", "add=ada", "requests_per_minute=100000")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = ["-m", "sora_train.serve", f"run_dir={folder}/run", f"port={port}", f"release={tmp_path}/release",
               "height=64", "width=64"]  # fmt: skip
    service, client = started(*command, "steps=400", "batch=1"), Client(port)
    line(service, "serving")
    ids = [client.ask(key, seed=seed) for seed in range(3)]
    while client.call("GET", f"/api/jobs/{ids[0]}", key).json["progress"] == 0:
        time.sleep(0.05)
    second = subprocess.run([sys.executable, *command], env=ENVIRONMENT, capture_output=True, timeout=120)
    assert second.returncode == 2 and b"another run works in" in second.stderr
    kill(service)
    service = started(*command)
    line(service, "serving")
    for id in ids:
        assert client.ended(key, id)["state"] == "done"
        (tmp_path / "got.mp4").write_bytes(client.call("GET", f"/api/jobs/{id}/video", key).body)
        assert verify(tmp_path / "got.mp4", ReleaseFolder(tmp_path / "release"), None).manifest_holds
        assert len(read_mp4(tmp_path / "got.mp4")[0]) == 9
    assert sorted(path.stem for path in (folder / "run/service/outputs").glob("*.mp4")) == sorted(ids)
    service.send_signal(signal.SIGTERM)
    assert service.wait(30) == 0
