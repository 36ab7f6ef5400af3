"""A running service, and a client of it."""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sora_train.service.database import Database
from tests.generation.conftest import folder, made  # noqa: F401  (fixtures)
from tests.release.conftest import made_folder  # noqa: F401  (a fixture)

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from tests.service.painter import Painter, Running  # noqa: E402


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
class Client:
    """Whoever talks to a port."""

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

    def raw(self, data: bytes, wait: float = 60.0) -> bytes:
        """Whatever comes back for these bytes."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=wait) as connection:
            connection.sendall(data)
            got = b""
            try:
                while part := connection.recv(65536):
                    got += part
                    if b"\r\n\r\n" in got:
                        break
            except TimeoutError:
                got += b"(nothing more)"
            return got

    def ask(self, key: str, **wish: Any) -> str:
        answer = self.call("POST", "/api/jobs", key, {"prompt": "a ring", **wish})
        assert answer.status == 202, answer
        return str(answer.json["id"])

    def ended(self, key: str, id: str, seconds: float = 60.0) -> Any:
        """The job when it has ended."""
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            job = self.call("GET", f"/api/jobs/{id}", key).json
            if job["state"] not in ("queued", "running"):
                return job
            time.sleep(0.05)
        raise TimeoutError(f"job {id} is {job}")


@dataclass
class Service(Client):
    """A running service and its client."""

    folder: Path
    database: Database
    painter: Painter


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Service]]:
    """Start services; all are stopped after the test."""
    running: list[Running] = []

    def go(**options: Any) -> Service:
        running.append(Running(tmp_path / "service", **options))
        one = running[-1]
        return Service(one.port, tmp_path / "service", one.database, one.painter)

    yield go
    for one in running:
        one.stop()


@pytest.fixture
def service(start: Callable[..., Service]) -> Service:
    """A service."""
    return start()


@pytest.fixture
def keys(service: Service) -> tuple[str, str]:
    """Keys of two of the invited."""
    return service.database.add_key("ada", 100.0, 6000), service.database.add_key("bob", 100.0, 6000)
