"""Attacks on the service, each with what it meets; afterwards the service answers as before."""

from __future__ import annotations

import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable

from sora_train.service.database import hash_of
from sora_train.service.limits import Bounds
from tests.service.conftest import Service

ID = "0" * 32
JSON = "Content-Type: application/json\r\n"
POST = f"POST /api/jobs HTTP/1.1\r\nHost: x\r\nKEY{JSON}"


@pytest.fixture
def ada(service: Service) -> str:
    return service.database.add_key("ada", 100.0, 100_000)


# A request as text, in which KEY and SECRET stand for a valid key, and the statuses that may answer it.
RAW: dict[str, tuple[str, set[int]]] = {
    "traversal in the path": ("GET /../../etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n", {404}),
    "traversal, percent-encoded": ("GET /%2e%2e/%2e%2e/etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n", {404}),
    "traversal, doubly encoded": ("GET /%252e%252e%252fservice.sqlite HTTP/1.1\r\nHost: x\r\n\r\n", {404}),
    "traversal with backslashes": ("GET /..\\..\\etc\\passwd HTTP/1.1\r\nHost: x\r\n\r\n", {404, 400}),
    "an absolute path as a job": ("GET /api/jobs//etc/passwd/video HTTP/1.1\r\nHost: x\r\nKEY\r\n", {404}),
    "a path as a job's id": ("GET /api/jobs/..%2f..%2fservice.sqlite/video HTTP/1.1\r\nHost: x\r\nKEY\r\n", {404, 422}),
    "a null byte in an id": (f"GET /api/jobs/{ID[:31]}%00/video HTTP/1.1\r\nHost: x\r\nKEY\r\n", {422}),
    "another form of the target": ("GET http://elsewhere/api/jobs HTTP/1.1\r\nHost: x\r\n\r\n", {401, 404, 400}),
    "CONNECT": ("CONNECT elsewhere:443 HTTP/1.1\r\nHost: elsewhere\r\n\r\n", {404, 405, 400}),
    "TRACE": ("TRACE /api/me HTTP/1.1\r\nHost: x\r\nKEY\r\n", {405}),
    "an unknown method": ("BREW /api/me HTTP/1.1\r\nHost: x\r\nKEY\r\n", {405}),
    "a method of 10 kB": ("A" * 10_000 + " / HTTP/1.1\r\nHost: x\r\n\r\n", {405, 404, 400}),
    "a target of 60 kB": ("GET /" + "a" * 60_000 + " HTTP/1.1\r\nHost: x\r\n\r\n", {400, 431, 404}),
    "a header of 60 kB": ("GET /api/me HTTP/1.1\r\nHost: x\r\nA: " + "b" * 60_000 + "\r\n\r\n", {400, 401, 431}),
    "2,000 headers": ("GET /api/me HTTP/1.1\r\nHost: x\r\n" + "A: b\r\n" * 8_000 + "\r\n", {400, 401, 431}),
    "no protocol": ("GET /\r\n\r\n", {400}),
    "binary noise": ("\x16\x03\x01\x02\x00\x01\xfc\r\n\r\n", {400}),
    "two lengths": (f"{POST}Content-Length: 2\r\nContent-Length: 3\r\n\r\n{{}}", {400}),
    "length and chunks (smuggling)": (
        f"{POST}Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
        "GET /api/me HTTP/1.1\r\nHost: x\r\n\r\n", {400, 422},
    ),
    "a negative length": (f"{POST}Content-Length: -5\r\n\r\n", {400}),
    "a huge length": (f"{POST}Content-Length: 999999999999\r\n\r\n", {413}),
    "a length of 100 digits": (f"{POST}Content-Length: {'9' * 100}\r\n\r\n", {400, 413}),
    "a line break in a header": ("GET /api/me HTTP/1.1\r\nHost: x\r\nA: b\rc\r\n\r\n", {400, 401}),
    "a key with a line break": ("GET /api/me HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer a\x00b\r\n\r\n", {400, 401}),
    "a key of 20 kB": ("GET /api/me HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + "a" * 20_000 + "\r\n\r\n", {401}),
    "a key beyond ASCII": ("GET /api/me HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer \xe9\xff\r\n\r\n", {400, 401}),
    "SQL in the key": ("GET /api/me HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer ' OR 1=1 --\r\n\r\n", {401}),
    "the key as a password": ("GET /api/me HTTP/1.1\r\nHost: x\r\nAuthorization: Basic YWRhOmFkYQ==\r\n\r\n", {401}),
    "the key in the target": ("GET /api/me?key=SECRET HTTP/1.1\r\nHost: x\r\n\r\n", {401}),
    "another host's name": ("GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n", {200}),
    "a forged address": ("GET /api/me HTTP/1.1\r\nHost: x\r\nX-Forwarded-For: 10.0.0.1\r\n\r\n", {401}),
    "an upgrade to a WebSocket": (
        "GET /api/me HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: YQ==\r\n"
        "Sec-WebSocket-Version: 13\r\n\r\n", {401, 400, 426},
    ),
    "a range of the wrong kind": (
        f"GET /api/jobs/{ID}/video HTTP/1.1\r\nHost: x\r\nKEYRange: bytes=9-1,-,x\r\n\r\n", {404},
    ),
}  # fmt: skip

BODIES: dict[str, tuple[bytes, set[int]]] = {
    "no JSON": (b"{", {422, 400}),
    "no object": (b"[]", {422}),
    "200 kB of JSON": (b'{"prompt": "' + b"a" * 200_000 + b'"}', {413}),
    "20,000 brackets deep": (b"[" * 20_000, {400, 422}),
    "an unknown field": (b'{"prompt": "a", "out": "/etc/passwd"}', {422}),
    "a path as image": (b'{"prompt": "a", "image": "/etc/passwd"}', {422}),
    "a path that climbs as video": (b'{"prompt": "a", "video": "../service.sqlite"}', {422}),
    "half of a pair as prompt": (b'{"prompt": "\\ud800"}', {422}),
    "a prompt of 3,000 letters": (b'{"prompt": "' + b"a" * 3_000 + b'"}', {422}),
    "infinite seconds": (b'{"prompt": "a", "seconds": Infinity}', {422}),
    "seconds that are no number": (b'{"prompt": "a", "seconds": NaN}', {422}),
    "negative seconds": (b'{"prompt": "a", "seconds": -1}', {422}),
    "a seed beyond 64 bits": (b'{"prompt": "a", "seed": 99999999999999999999999999}', {422}),
    "a number of 5,000 digits": (b'{"prompt": "a", "seed": ' + b"9" * 5_000 + b"}", {400, 422}),
    "text as seed": (b'{"prompt": "a", "seed": "1; DROP TABLE jobs"}', {422}),
    "bytes beyond UTF-8": (b'{"prompt": "\xff\xfe"}', {400, 422}),
    "markup as prompt": (b'{"prompt": "<script>alert(1)</script>"}', {202}),
    "SQL as prompt": (b'{"prompt": "\'; DROP TABLE jobs; --"}', {202}),
    "control characters as prompt": (b'{"prompt": "\\u0000\\u001b[2J"}', {202}),
}


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/1.1 ") else 0


@pytest.fixture
def still_well(service: Service, ada: str) -> Iterator[None]:
    """After the attack the service answers, and its secrets are where they were."""
    yield
    assert service.call("GET", "/health").status == 200
    assert service.call("GET", "/api/me", ada).status == 200


def test_there_are_enough() -> None:
    assert len(RAW) + len(BODIES) >= 40


def test_raw_requests_meet_a_refusal(service: Service, ada: str, still_well: None) -> None:
    (service.folder / "secret.txt").write_text("top secret")
    met = {}
    for name, (text, wanted) in RAW.items():
        data = text.replace("KEY", f"Authorization: Bearer {ada}\r\n").replace("SECRET", ada).encode("latin-1")
        answer = service.raw(data)
        met[name] = status_of(answer)
        assert met[name] in wanted, (name, answer[:300])
        assert b"top secret" not in answer and b"root:" not in answer and b"Traceback" not in answer, name


def test_bodies_meet_a_refusal(service: Service, ada: str, still_well: None) -> None:
    for name, (body, wanted) in BODIES.items():
        answer = service.call("POST", "/api/jobs", ada, body, Content_Type="application/json")
        assert answer.status in wanted, (name, answer)
        assert b"Traceback" not in answer.body and b"/work" not in answer.body, name


def test_a_slow_body_is_hung_up_on(service: Service, ada: str, still_well: None) -> None:
    head = f"POST /api/jobs HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ada}\r\n{JSON}Content-Length: 100\r\n\r\n"
    assert status_of(service.raw(head.encode() + b'{"pro', wait=120)) == 408


def test_a_slow_head_is_hung_up_on(service: Service, still_well: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sora_train.service.server._HEAD_S", 0.5)
    assert service.raw(b"GET / HTTP/1.1\r\nHost: x\r\nX-A: b", wait=120) == b""


def test_an_endless_body_is_cut(service: Service, ada: str, still_well: None) -> None:
    head = f"POST /api/uploads HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ada}\r\nTransfer-Encoding: chunked\r\n\r\n"
    piece = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    assert status_of(service.raw(head.encode() + piece * 17)) == 413  # 1 MiB and a piece; bounds say 1 MiB
    assert list((service.folder / "uploads").iterdir()) == []


def test_many_half_open_connections_leave_room(service: Service, ada: str, still_well: None) -> None:
    import socket

    half = [socket.create_connection(("127.0.0.1", service.port)) for _ in range(100)]
    for connection in half:
        connection.sendall(b"GET / HTTP/1.1\r\nHost:")
    assert service.call("GET", "/api/me", ada).status == 200
    for connection in half:
        connection.close()


def test_guessing_keys_by_time_learns_nothing(service: Service, ada: str) -> None:
    """A key that shares all but its end with a valid one takes the time of any other: the search is by its hash."""
    near, far = ada[:-1] + ("a" if ada[-1] != "a" else "b"), "sora_" + "x" * (len(ada) - 5)
    assert hash_of(near)[:4] != hash_of(ada)[:4] or hash_of(near) != hash_of(ada)
    taken: dict[str, list[float]] = {near: [], far: []}
    for _ in range(300):
        for guess, times in taken.items():
            began = time.thread_time()
            assert service.database.key(guess) is None
            times.append(time.thread_time() - began)
    medians = [statistics.median(times) for times in taken.values()]
    assert max(medians) / min(medians) < 1.5


def test_only_allowed_addresses(start: Callable[..., Service]) -> None:
    import ipaddress

    bounds = Bounds(1 << 16, 1 << 20, 2.0, (ipaddress.ip_network("10.0.0.0/8"),))
    service = start(bounds=bounds)
    assert service.call("GET", "/").status == 403
    assert service.call("GET", "/", None, None, X_Forwarded_For="10.0.0.1").status == 403


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    method=st.sampled_from(["GET", "POST", "DELETE", "PUT", "PATCH", "HEAD", "OPTIONS"]),
    path=st.sampled_from(
        ["/api/jobs", "/api/me", "/api/uploads", f"/api/jobs/{ID}", f"/api/jobs/{ID}/report", "/health"]
    ),
    body=st.one_of(
        st.none(), st.binary(max_size=200),
        st.recursive(
            st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=20),
            lambda inner: st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["prompt", "seconds", "seed", "image", "video", "text"]), inner, max_size=4
            ),
            max_leaves=8,
        ),
    ),
)  # fmt: skip
def test_fuzzed_requests_meet_no_error(service: Service, ada: str, method: str, path: str, body: object) -> None:
    sent = body if isinstance(body, bytes) or body is None else json.dumps(body).encode("utf-8", "replace")
    answer = service.call(method, path, ada, sent, Content_Type="application/json")
    assert answer.status < 500, (method, path, body, answer)


@pytest.mark.parametrize("examples", [6, pytest.param(20, marks=pytest.mark.campaign)])
def test_requests_made_from_its_own_description_meet_no_error(service: Service, ada: str, examples: int) -> None:
    """Schemathesis makes right and wrong requests of every operation that /openapi.json describes."""
    schemathesis = pytest.importorskip("schemathesis")
    schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{service.port}/openapi.json")
    tried: Counter[str] = Counter()

    def answered(case: Any) -> None:
        for key in (ada, "sora_wrong"):
            answer = case.call(headers={"Authorization": f"Bearer {key}"}, timeout=120)
            tried[f"{case.method} {case.operation.path}"] += 1
            assert answer.status_code < 500, (case.as_curl_command(), answer.text)

    quick = settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    for found in schema.get_all_operations():
        for mode in schemathesis.GenerationMode:
            with suppress(Unsatisfiable):  # where there is nothing in a request that could be wrong
                quick(given(case=found.ok().as_strategy(generation_mode=mode))(answered))()
    assert len(tried) >= 8 and sum(tried.values()) > 15 * examples, tried


def test_no_path_of_a_client_is_opened() -> None:
    """What reaches the file system is made of ids that the service drew, or of names that it wrote."""
    source = (Path(__file__).parents[2] / "sora_train/service/app.py").read_text()
    opened = [line.strip() for line in source.splitlines() if "folder /" in line]
    assert opened and all(any(safe in line for safe in ("job.file", "/ id", "AUDIT", "REPORTS")) for line in opened)
