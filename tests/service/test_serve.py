"""The command itself: keys, a real (untrained) model, kill -9 and back, bad media, a browser."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sora_train import serve
from sora_train.core.cli import InputError
from sora_train.core.media import read_mp4, write_mp4
from sora_train.release.folder import ReleaseFolder
from sora_train.release.verify import verify

ROOT = Path(__file__).resolve().parents[2]


class Process:
    """The service as a process of its own."""

    def __init__(self, run: Path, release: Path, *arguments: str) -> None:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self.port = found.getsockname()[1]
        self.command = [
            sys.executable, "-m", "sora_train.serve", f"run_dir={run}", f"port={self.port}", f"release={release}",
            "height=64", "width=64", *arguments,
        ]  # fmt: skip
        self.start()

    def start(self) -> None:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
        self.process = subprocess.Popen(self.command, env=environment, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        assert "serving" in self.process.stdout.readline()
        ends = time.monotonic() + 20
        while time.monotonic() < ends:
            try:
                assert self.get("/health")[0] == 200
                return
            except OSError:
                time.sleep(0.05)
        raise TimeoutError("the service doesn't answer")

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(10)
        assert self.process.stdout is not None
        self.process.stdout.close()

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(20)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code

    def get(self, path: str, key: str = "", method: str = "GET", body: Any = None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
        try:
            connection.request(method, path, data, {"Authorization": f"Bearer {key}", "Content-Type": kind})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def ask(self, key: str, **wish: Any) -> str:
        status, body = self.get("/api/jobs", key, "POST", {"prompt": "a ring", **wish})
        assert status == 202, body
        return str(json.loads(body)["id"])

    def job(self, key: str, id: str) -> Any:
        return json.loads(self.get(f"/api/jobs/{id}", key)[1])

    def ended(self, key: str, id: str, seconds: float = 40) -> Any:
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            if (job := self.job(key, id))["state"] not in ("queued", "running"):
                return job
            time.sleep(0.1)
        raise TimeoutError(str(job))


@pytest.fixture
def give(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Give the command; returns what it prints."""

    def go(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["serve", *arguments])
        assert serve.main() == 0
        return capsys.readouterr().out.strip()

    return go


@pytest.fixture
def release(made_folder: Path, tmp_path: Path) -> ReleaseFolder:
    shutil.copytree(made_folder, tmp_path / "release")
    return ReleaseFolder(tmp_path / "release")


@pytest.fixture
def started(folder: Path, release: ReleaseFolder) -> Iterator[Callable[..., Process]]:
    """Start the service on the run."""
    running: list[Process] = []

    def go(*arguments: str) -> Process:
        running.append(Process(folder / "run", release.path, *arguments))
        return running[-1]

    yield go
    for one in running:
        if one.process.poll() is None:
            one.kill()


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


def test_a_killed_service_takes_its_jobs_up_again(
    folder: Path,
    release: ReleaseFolder,
    started: Callable[..., Process],
    give: Callable[..., str],
) -> None:
    """Killed in a job: it and the waiting ones are made, each once, marked and signed; bad uploads end as failures."""
    key = give(f"run_dir={folder}/run", "add=ada", "requests_per_minute=100000")
    service = started("steps=400", "batch=1")
    ids = [service.ask(key, seed=seed) for seed in range(3)]
    while service.job(key, ids[0])["state"] != "running" or service.job(key, ids[0])["progress"] == 0:
        time.sleep(0.05)
    service.kill()
    service.command = [a for a in service.command if not a.startswith("steps=")]
    service.start()
    for id in ids:
        assert service.ended(key, id)["state"] == "done"
    videos = sorted(path.stem for path in (folder / "run/service/outputs").glob("*.mp4"))
    assert videos == sorted(ids)
    found = verify(folder / f"run/service/outputs/{ids[0]}.mp4", release, None)
    assert found.manifest_holds
    _bad_media(service, key)
    _refused(service, key)
    assert service.stop() == 0


def _bad_media(service: Process, key: str) -> None:
    for name, data in {
        "text": b"no picture", "a cut PNG": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "a lying MP4": b"\0\0\0\x20ftypisom" + b"x" * 99,
        "a bomb": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + b"\0\1\0\0" * 2 + b"\x08\2\0\0\0" + b"\0" * 40,
    }.items():  # fmt: skip
        status, body = service.get("/api/uploads", key, "POST", data)
        job = service.ended(key, service.ask(key, image=json.loads(body)["id"]))
        assert (name, status, job["state"]) == (name, 201, "failed"), job
        assert "the upload can't be used" in job["message"] and "/" not in job["message"].replace("/s", ""), job


def _refused(service: Process, key: str) -> None:
    job = service.ended(key, service.ask(key, prompt="some p.o.r.n"))
    assert (job["state"], job["message"]) == ("refused", "refused: sexual")


def test_requests_of_different_sizes_share_packs(
    folder: Path,
    started: Callable[..., Process],
    give: Callable[..., str],
) -> None:
    key = give(f"run_dir={folder}/run", "add=ada", "requests_per_minute=100000")
    service = started("batch=4")
    write_mp4(folder / "before.mp4", np.full((6, 64, 64, 3), 90, dtype=np.uint8), 4.0)
    upload = json.loads(service.get("/api/uploads", key, "POST", (folder / "before.mp4").read_bytes())[1])["id"]
    wishes = [{"seconds": 0.25}, {"seconds": 2.25}, {"seconds": 1.25, "seed": 4}, {"video": upload}, {"seconds": 5.0}]
    ids = [service.ask(key, **wish) for wish in wishes]
    for id, wish in zip(ids, wishes, strict=True):
        job = service.ended(key, id)
        assert job["state"] == "done", (wish, job)
    lengths = []
    for id in ids[1:3]:
        (folder / "got.mp4").write_bytes(service.get(f"/api/jobs/{id}/video", key)[1])
        lengths.append(len(read_mp4(folder / "got.mp4")[0]))
    assert lengths == [9, 5]
    second = subprocess.run(
        service.command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, timeout=60
    )
    assert second.returncode == 2 and b"another run works in" in second.stderr
