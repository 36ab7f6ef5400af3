"""The API: jobs from asking to download, who may see what, quotas and rates, fairness, cancelling, restarts."""

from __future__ import annotations

import json
import stat
import time
from collections.abc import Callable

import pytest

from sora_train.core.media import read_mp4
from sora_train.service.database import ATTEMPTS, Database
from sora_train.service.limits import Rate
from tests.service.conftest import Service

Keys = tuple[str, str]


def test_a_job_from_asking_to_download(service: Service, keys: Keys) -> None:
    ada, _ = keys
    assert service.call("GET", "/api/me", ada).json["seconds_left_today"] == 100
    id = service.ask(ada, prompt="a red ring", seconds=2.0, seed=5)
    job = service.ended(ada, id)
    assert (job["state"], job["prompt"], job["seconds"], job["seed"]) == ("done", "a red ring", 2.0, 5)
    video = service.call("GET", f"/api/jobs/{id}/video", ada)
    assert video.status == 200 and len(read_mp4(video.body)[0]) == 4
    part = service.call("GET", f"/api/jobs/{id}/video", ada, Range="bytes=0-9")
    assert part.status == 206 and part.body == video.body[:10]
    assert service.call("GET", "/api/me", ada).json["seconds_left_today"] == 98
    assert [one["id"] for one in service.call("GET", "/api/jobs", ada).json] == [id]


def test_anothers_job_is_not_there(service: Service, keys: Keys) -> None:
    ada, bob = keys
    id = service.ask(ada)
    service.ended(ada, id)
    for method, path in (
        ("GET", f"/api/jobs/{id}"), ("GET", f"/api/jobs/{id}/video"), ("DELETE", f"/api/jobs/{id}"),
        ("POST", f"/api/jobs/{id}/report"),
    ):  # fmt: skip
        body = {"text": "x"} if method == "POST" else None
        answer, absent = (service.call(method, p, bob, body) for p in (path, path.replace(id, "0" * 32)))
        assert answer.status == absent.status == 404 and answer.body == absent.body
    assert service.call("GET", "/api/jobs", bob).json == []


def test_without_a_valid_key_nothing_opens(service: Service, keys: Keys) -> None:
    for key in (None, "", "sora_wrong", keys[0][:-1], keys[0].upper()):
        for method, path in (("GET", "/api/me"), ("POST", "/api/jobs"), ("POST", "/api/uploads")):
            assert service.call(method, path, key).status == 401
    service.database.revoke("ada")
    assert service.call("GET", "/api/me", keys[0]).status == 401
    assert service.call("GET", "/api/me", keys[1]).status == 200


def test_revoking_cancels_what_waits(service: Service, keys: Keys) -> None:
    service.painter.slow = 0.5
    ids = [service.ask(keys[0]) for _ in range(4)]
    service.database.revoke("ada")
    states = {service.database.job(id, "ada").state for id in ids}  # type: ignore[union-attr]
    assert states <= {"cancelled", "done"} and "cancelled" in states


def test_keys_are_stored_hashed(service: Service, keys: Keys) -> None:
    content = b"".join(path.read_bytes() for path in service.folder.glob("service.sqlite*"))
    assert b"ada" in content and not any(key.encode() in content or key[5:].encode() in content for key in keys)
    assert len({*keys}) == 2 and all(len(key) > 40 for key in keys)


def test_quotas(start: Callable[..., Service]) -> None:
    service = start(most_waiting=3)
    service.painter.slow = 0.5
    few, short = service.database.add_key("few", 100.0, 600), service.database.add_key("short", 3.0, 600)
    wish = {"prompt": "a", "seconds": 2.0}
    assert [service.call("POST", "/api/jobs", few, wish).status for _ in range(5)] == [202, 202, 202, 429, 429]
    assert [service.call("POST", "/api/jobs", short, wish).status for _ in range(2)] == [202, 429]
    assert service.call("POST", "/api/jobs", few, wish | {"seconds": 5.0}).status == 422, "above what any may ask for"


def test_what_fails_does_not_count(service: Service, keys: Keys) -> None:
    for prompt, message in (("fail", "it can't be"), ("break", "an error of the service; its log says more")):
        job = service.ended(keys[0], service.ask(keys[0], prompt=prompt))
        assert (job["state"], job["message"]) == ("failed", message)
    assert service.call("GET", "/api/me", keys[0]).json["seconds_left_today"] == 100


def test_a_rate_is_held(service: Service) -> None:
    slow = service.database.add_key("slow", 10.0, 5)
    statuses = [service.call("GET", "/api/me", slow).status for _ in range(8)]
    assert statuses == [200] * 5 + [429] * 3
    rate = Rate()
    assert [rate.allows("a", 2) for _ in range(3)] == [True, True, False] and rate.allows("b", 2)


def test_wrong_keys_are_slowed_down_by_address(service: Service, keys: Keys) -> None:
    statuses = [service.call("GET", "/api/me", f"sora_{n}").status for n in range(25)]
    assert statuses[:20] == [401] * 20 and set(statuses[20:]) == {429}
    assert service.call("GET", "/api/me", keys[0]).status == 200, "who has a key isn't locked out"


def test_the_order_is_fair(start: Callable[..., Service]) -> None:
    """One asks for six at once, another for two afterwards: these don't wait for all six."""
    service = start(batch=1)
    ada, bob = service.database.add_key("ada", 100, 6000), service.database.add_key("bob", 100, 6000)
    service.painter.slow = 3600.0  # the first holds the others up until all are asked
    many = [service.ask(ada) for _ in range(6)]
    two = [service.ask(bob) for _ in range(2)]
    service.painter.slow = 0.0
    for key, ids in ((ada, many), (bob, two)):
        for id in ids:
            assert service.ended(key, id)["state"] == "done"
    place = {id: n for n, id in enumerate(service.painter.made)}
    assert [place[id] for id in two] <= [2, 4] and sorted(place[id] for id in many) == [place[id] for id in many]


def test_cancelling(start: Callable[..., Service]) -> None:
    service = start(batch=1)
    key = service.database.add_key("ada", 100, 6000)
    service.painter.slow = 3600.0
    running, waiting = service.ask(key), service.ask(key)
    while service.call("GET", f"/api/jobs/{running}", key).json["state"] != "running":
        time.sleep(0.02)
    assert service.call("GET", f"/api/jobs/{waiting}", key).json["ahead"] == 1
    assert service.call("GET", f"/api/jobs/{running}/video", key).status == 409
    for id in (running, waiting):
        assert service.call("DELETE", f"/api/jobs/{id}", key).json["state"] == "cancelled"
        assert service.call("DELETE", f"/api/jobs/{id}", key).status == 409
    service.painter.slow = 0.0
    assert service.ended(key, service.ask(key))["state"] == "done", "the worker goes on at once"
    assert not (service.folder / "outputs" / f"{running}.mp4").exists()


def test_a_problem_is_reported(service: Service, keys: Keys) -> None:
    id = service.ask(keys[0])
    assert service.call("POST", f"/api/jobs/{id}/report", keys[0], {"text": "that's me"}).status == 202
    (line,) = (service.folder / "reports.jsonl").read_text().splitlines()
    assert json.loads(line)["text"] == "that's me" and json.loads(line)["job"] == id


def test_everything_is_in_the_audit_log_but_prompts_and_keys(service: Service, keys: Keys) -> None:
    id = service.ask(keys[0], prompt="a very private prompt")
    service.ended(keys[0], id)
    service.call("GET", "/api/me", "sora_wrong")
    path = service.folder / "audit.jsonl"
    text = path.read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    asked = next(line for line in lines if line["method"] == "POST")
    assert (asked["key"], asked["job"], asked["status"]) == ("ada", id, 202)
    assert lines[-1]["status"] == 401, "each is written before its answer"
    assert "private" not in text and keys[0] not in text and "sora_wrong" not in text
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_uploads_are_each_keys_own(service: Service, keys: Keys) -> None:
    ada, bob = keys
    upload = service.call("POST", "/api/uploads", ada, b"anything").json["id"]
    assert service.call("POST", "/api/jobs", bob, {"prompt": "a", "image": upload}).status == 404
    assert service.call("POST", "/api/jobs", ada, {"prompt": "a", "image": upload}).status == 202
    assert service.call("POST", "/api/jobs", ada, {"prompt": "a", "image": upload, "video": upload}).status == 422
    statuses = [service.call("POST", "/api/uploads", ada, b"x" * 1_000_000).status for _ in range(4)]
    assert statuses == [201, 201, 201, 429]


def test_what_is_running_when_the_service_dies_is_taken_up_again(tmp_path_factory: pytest.TempPathFactory) -> None:
    database = Database(tmp_path_factory.mktemp("d") / "service.sqlite")
    key = database.key(database.add_key("ada", 100, 10))
    assert key is not None
    id = database.add_job(key, "{}", 1.0, 8)
    for attempt in range(1, ATTEMPTS + 1):
        job = database.claim()
        assert job is not None and (job.id, job.attempts) == (id, attempt) and database.claim() is None
        assert database.recover() == (1 if attempt < ATTEMPTS else 0)
    ended = database.job(str(id), "ada")
    assert ended is not None and ended.state == "failed"


def test_old_jobs_and_uploads_are_forgotten(service: Service, keys: Keys) -> None:
    id = service.ask(keys[0])
    service.ended(keys[0], id)
    upload = service.call("POST", "/api/uploads", keys[0], b"x").json["id"]
    assert service.database.expired(time.time() - 60) == []
    assert service.database.expired(time.time() + 60) == [f"{id}.mp4", upload]
    assert service.call("GET", f"/api/jobs/{id}", keys[0]).status == 404


def test_the_page_needs_nothing_from_elsewhere(service: Service) -> None:
    for path, kind in (("/", "text/html"), ("/app.js", "text/javascript"), ("/style.css", "text/css")):
        answer = service.call("GET", path)
        assert answer.status == 200 and answer.headers["content-type"].startswith(kind)
        assert (
            "http:" not in answer.body.decode().replace("http://www.w3.org", "")
            and "https:" not in answer.body.decode()
        )
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert "innerHTML" not in service.call("GET", "/app.js").body.decode()
