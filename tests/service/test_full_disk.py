"""A disk that fills up under the service: only what can be kept is accepted, and what was accepted is made later."""

from __future__ import annotations

import errno
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sora_train import serve
from sora_train.core.cli import InputError
from sora_train.service import limits, worker
from sora_train.service.server import Address, listening
from tests.service.conftest import Service

Keys = tuple[str, str]


class Disk:
    """A disk that can be full."""

    full = False

    def __call__(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def write(*arguments: Any, **named: Any) -> Any:
            if self.full:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*arguments, **named)

        return write


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    monkeypatch.setattr(worker, "_AGAIN_S", 0.05)
    return Disk()


def test_nothing_is_accepted_while_the_database_cannot_be_written(
    service: Service, keys: Keys, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = service.ask(keys[0])
    assert service.ended(keys[0], first)["state"] == "done"
    real = service.database._writing

    def writing() -> Any:
        if disk.full:
            raise sqlite3.OperationalError("database or disk is full")
        return real()

    monkeypatch.setattr(service.database, "_writing", writing)
    disk.full = True
    answer = service.call("POST", "/api/jobs", keys[0], {"prompt": "a ring"})
    assert answer.status == 503 and answer.json["detail"].startswith("the service can't write")
    assert service.call("GET", f"/api/jobs/{first}/video", keys[0]).status == 200, "what is there is delivered"
    time.sleep(0.3)  # for the worker to meet it, several times
    disk.full = False
    assert service.ended(keys[0], service.ask(keys[0]))["state"] == "done", "the worker is alive"


def test_a_job_whose_video_finds_no_room_waits_and_is_made(
    service: Service, keys: Keys, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = service.painter._one

    def one(watch: Any) -> str | Exception:
        if disk.full:
            error = InputError("clip.mp4 can't be written: No space left on device")
            error.__cause__ = OSError(errno.ENOSPC, "No space left on device")
            return error
        return real(watch)

    monkeypatch.setattr(service.painter, "_one", one)
    disk.full = True
    ids = [service.ask(keys[0], seed=seed) for seed in range(5)]
    time.sleep(0.5)
    assert {service.call("GET", f"/api/jobs/{id}", keys[0]).json["state"] for id in ids} <= {"queued", "running"}
    disk.full = False
    assert [service.ended(keys[0], id)["state"] for id in ids] == ["done"] * 5
    assert sorted(service.painter.made) == sorted(ids), "each once"


def test_requests_that_cannot_be_logged_do_nothing(
    service: Service, keys: Keys, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "append_line", disk(limits.append_line))
    disk.full = True
    assert service.call("GET", "/api/me", keys[0]).status == 200
    assert service.call("POST", "/api/jobs", keys[0], {"prompt": "a ring"}).status == 503
    disk.full = False
    id = service.ask(keys[0])
    log = (service.folder / "audit.jsonl").read_text()
    assert log.count('"status": 503') == 1 and log.count('"path": "/api/me"') == 1 and id in log
    assert [job.id for job in service.database.jobs("ada")] == [id]


def test_an_upload_that_finds_no_room_is_forgotten(
    service: Service, keys: Keys, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sora_train.service import app

    monkeypatch.setattr(app.os, "fdopen", disk(app.os.fdopen))
    disk.full = True
    headers = {"Content_Type": "application/octet-stream"}
    for _ in range(3):  # of 3 MiB that a key may hold
        assert service.call("POST", "/api/uploads", keys[0], b"x" * (1 << 19), **headers).status == 503
    assert not list((service.folder / "uploads").iterdir())
    disk.full = False
    assert service.call("POST", "/api/uploads", keys[0], b"x" * (1 << 19), **headers).status == 201


def test_a_folder_port_or_certificate_that_cannot_be_used_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, service: Service
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/service.sqlite").write_text("no database, but a text that is long enough to be read as one" * 9)
    for folder, says in ((tmp_path / "file/below", "can't be used: Not a directory"), (tmp_path / "other", "can't be")):
        monkeypatch.setattr("sys.argv", ["serve", f"run_dir={tmp_path}/run", f"folder={folder}", "list=true"])
        with pytest.raises(InputError, match=says):
            serve.main()
    with pytest.raises(InputError, match=f"port={service.port}: Address already in use"):
        listening(Address(port=service.port))
    with pytest.raises(InputError, match="tls_certificate=.* and tls_key=.*"):
        listening(Address(tls_certificate=str(tmp_path / "file"), tls_key=str(tmp_path / "file")))
    with pytest.raises(InputError, match="host=nowhere.invalid"):
        listening(Address(host="nowhere.invalid"))
    listening(Address()).close()
