"""The service in this process, with a maker that needs no model."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sora_train.core.cli import InputError
from sora_train.core.media import write_mp4
from sora_train.service.database import Database, Job
from sora_train.service.worker import Cancelled, Watch, Worker
from tests.generation.conftest import folder, made  # noqa: F401  (fixtures)
from tests.release.conftest import made_folder  # noqa: F401  (a fixture)

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

import uvicorn  # noqa: E402

from sora_train.service.app import Terms, build_app  # noqa: E402
from sora_train.service.limits import Bounds, ImpatientProtocol  # noqa: E402

BOUNDS = Bounds(1 << 16, 1 << 20, 2.0)


class Painter:
    """Stands in for the model: a grey video after a while. `slow` seconds a job; the prompt "fail" fails."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.slow, self.made = folder, 0.0, list[str]()

    def together(self, jobs: Sequence[Job], next: Job) -> bool:
        return True

    def make(self, watches: Sequence[Watch]) -> dict[str, str | Exception]:
        found: dict[str, str | Exception] = {}
        for watch in watches:
            found[watch.job.id] = self._one(watch)
        return found

    def forget(self, job: Job) -> None:
        (self.folder / "outputs" / f"{job.id}.mp4").unlink(missing_ok=True)

    def _one(self, watch: Watch) -> str | Exception:
        wish = json.loads(watch.job.request)
        if wish["prompt"] == "fail":
            return InputError("it can't be")
        if wish["prompt"] == "break":
            return ZeroDivisionError("a fault of ours")
        ends = time.monotonic() + self.slow
        while time.monotonic() < ends:
            try:
                watch.progress(0.5)
            except Cancelled as error:
                return error
            time.sleep(0.02)
        name = f"{watch.job.id}.mp4"
        write_mp4(self.folder / "outputs" / name, np.full((4, 32, 32, 3), 100, dtype=np.uint8), 8)
        self.made.append(watch.job.id)
        return name


@dataclass
class Answer:
    """An answer of the service."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Service:
    """A running service."""

    folder: Path
    database: Database
    painter: Painter
    port: int

    def call(self, method: str, path: str, key: str | None = None, body: Any = None, **headers: str) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if key is not None:
            sent["Authorization"] = f"Bearer {key}"
        if body is not None and not isinstance(body, bytes):
            body, sent = json.dumps(body).encode(), {"Content-Type": "application/json", **sent}
        try:
            connection.request(method, path, body, sent)
            answer = connection.getresponse()
            return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        finally:
            connection.close()

    def raw(self, data: bytes, wait: float = 5.0, then: bytes = b"") -> bytes:
        """Whatever comes back for these bytes."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=wait) as connection:
            connection.sendall(data)
            if then:
                time.sleep(0.3)
                connection.sendall(then)
            got = b""
            try:
                while part := connection.recv(65536):
                    got += part
                    if b"\r\n\r\n" in got and b"100 Continue" not in got:
                        break
            except TimeoutError:
                got += b"(nothing more)"
            return got

    def ask(self, key: str, **wish: Any) -> str:
        answer = self.call("POST", "/api/jobs", key, {"prompt": "a ring", **wish})
        assert answer.status == 202, answer
        return str(answer.json["id"])

    def ended(self, key: str, id: str, seconds: float = 20.0) -> Any:
        """The job when it has ended."""
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            job = self.call("GET", f"/api/jobs/{id}", key).json
            if job["state"] not in ("queued", "running"):
                return job
            time.sleep(0.05)
        raise TimeoutError(f"job {id} is {job}")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Service]]:
    """Start services; all are stopped after the test."""
    running: list[tuple[uvicorn.Server, threading.Thread, Worker]] = []

    def go(bounds: Bounds = BOUNDS, batch: int = 2, most_waiting: int = 8) -> Service:
        folder = tmp_path / "service"
        for part in ("outputs", "uploads"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        database, painter = Database(folder / "service.sqlite"), Painter(folder)
        worker = Worker(database, painter, batch, lambda: None)
        terms = Terms(4.0, 1.0, most_waiting=most_waiting, most_upload_bytes=3 << 20, contact="lab@example.org")
        app = build_app(folder, database, terms, bounds, worker.wake)
        config = uvicorn.Config(app, port=0, http=ImpatientProtocol, log_level="warning", lifespan="off", ws="none",
                                timeout_keep_alive=2, server_header=False, h11_max_incomplete_event_size=32 << 10)  # fmt: skip
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        worker.start()
        running.append((server, thread, worker))
        return Service(folder, database, painter, server.servers[0].sockets[0].getsockname()[1])

    yield go
    for server, thread, worker in running:
        worker.stop()
        server.should_exit = True
        thread.join(10)


@pytest.fixture
def service(start: Callable[..., Service]) -> Service:
    return start()


@pytest.fixture
def keys(service: Service) -> tuple[str, str]:
    """Keys of two of the invited."""
    return service.database.add_key("ada", 100.0, 6000), service.database.add_key("bob", 100.0, 6000)
