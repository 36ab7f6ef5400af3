"""Many clients at once: nothing is lost, the order is fair, memory stays flat. A short sample, and a long campaign."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import psutil
import pytest

from tests.service.conftest import Service


def load(service: Service, clients: int, seconds: float) -> tuple[dict[str, list[str]], list[int]]:
    """Clients that ask and wait in turn for so long; their finished jobs by client, and memory over time in bytes."""
    keys = {f"client-{n}": service.database.add_key(f"client-{n}", 1e9, 1_000_000) for n in range(clients)}
    done: dict[str, list[str]] = {name: [] for name in keys}
    wrong: list[object] = []
    ends = time.monotonic() + seconds

    def client(name: str, key: str) -> None:
        try:
            while time.monotonic() < ends:
                id = service.ask(key, seconds=0.5)
                while (job := service.call("GET", f"/api/jobs/{id}", key).json)["state"] in ("queued", "running"):
                    time.sleep(0.1)
                answer = service.call("GET", f"/api/jobs/{id}/video", key)
                if job["state"] != "done" or answer.status != 200 or len(answer.body) < 500:
                    wrong.append((name, job, answer.status))
                done[name].append(id)
        except (OSError, AssertionError) as error:
            wrong.append((name, error))

    threads = [threading.Thread(target=client, args=item) for item in keys.items()]
    for thread in threads:
        thread.start()
    memory, process = [], psutil.Process()
    while any(thread.is_alive() for thread in threads):
        memory.append(process.memory_info().rss)
        time.sleep(0.25)
    assert wrong == []
    return done, memory


def check(service: Service, done: dict[str, list[str]]) -> None:
    every = [id for ids in done.values() for id in ids]
    assert len(set(every)) == len(every) and sorted(every) == sorted(service.painter.made), (
        "each made and delivered once"
    )
    jobs = [job for name in done for job in service.database.jobs(name, 1_000_000)]
    starts = {name: [job.started for job in jobs if job.key == name and job.started] for name in done}
    for job in jobs:
        assert job.started is not None
        while_waiting = {
            name: sum(job.made < start < job.started for start in starts[name]) for name in done if name != job.key
        }
        # one, and one more that began while this job was being accepted
        assert max(while_waiting.values()) <= 2, f"others went often before {job.id}: {while_waiting}"


def test_ten_clients_for_three_seconds(start: Callable[..., Service]) -> None:
    service = start(batch=2, slow=0.05)  # slow enough for a queue
    check(service, load(service, 10, 3.0)[0])


@pytest.mark.campaign
def test_fifty_clients_for_a_minute(start: Callable[..., Service]) -> None:
    service = start(batch=4)
    done, memory = load(service, 50, 60.0)
    check(service, done)
    third = len(memory) // 3
    early, late = max(memory[:third]), max(memory[-third:])
    counts = [len(ids) for ids in done.values()]
    print(f"{sum(counts)} jobs, {min(counts)} to {max(counts)} a client; memory {early >> 20} to {late >> 20} MiB")
    assert late < early + (48 << 20)
