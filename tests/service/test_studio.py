"""The maker with a model: sizes, given files, refusals, bad media, cancelling."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sora_train.core.media import read_mp4, write_mp4, write_png
from sora_train.generation.options import Options
from sora_train.operations.source import Source
from sora_train.release.chosen import safeguards_for
from sora_train.release.folder import ReleaseFolder
from sora_train.release.verify import verify
from sora_train.service.database import Database, Job, Key
from sora_train.service.studio import Studio
from sora_train.service.worker import Worker

WISH: dict[str, Any] = {"prompt": "a ring", "seed": 0, "image": None, "video": None}
KEY = Key("ada", 1e6, 1000)


class Place:
    """A service folder with a database and a studio."""

    def __init__(self, folder: Path, made_folder: Path, **options: Any) -> None:
        self.folder = folder / "service"
        for part in ("outputs", "uploads"):
            (self.folder / part).mkdir(parents=True)
        shutil.copytree(made_folder, folder / "release")
        self.release = ReleaseFolder(folder / "release")
        self.database = Database(self.folder / "service.sqlite")
        source = Source(Options(run_dir=str(folder / "run"), height=64, width=64, **options))
        safeguards = safeguards_for(str(folder / "release"), closed=True)
        self.studio = Studio(source, safeguards, self.folder, most_seconds=6.0)
        self.packs: list[int] = []

    def ask(self, seconds: float = 1.25, **wish: Any) -> str:
        id = self.database.add_job(KEY, json.dumps(WISH | wish), seconds, 100)
        assert id is not None
        return id

    def upload(self, data: bytes) -> str:
        id = self.database.add_upload("ada", len(data), 1 << 30)
        (self.folder / "uploads" / str(id)).write_bytes(data)
        return str(id)

    def work(self, ids: list[str], batch: int = 4) -> list[Job]:
        """The jobs when all have ended."""
        worker = Worker(self.database, self.studio, batch, lambda: None)
        worker.start()
        ends = time.monotonic() + 120
        try:
            while time.monotonic() < ends:
                jobs = [self.database.job(id, "ada") for id in ids]
                if all(job is not None and job.ended for job in jobs):
                    return [job for job in jobs if job is not None]
                time.sleep(0.05)
        finally:
            worker.stop()
        raise TimeoutError(str(jobs))

    def video(self, job: Job) -> np.ndarray:
        assert job.state == "done", job
        assert verify(self.folder / "outputs" / job.file, self.release, None).manifest_holds
        return read_mp4(self.folder / "outputs" / job.file)[0]


@pytest.fixture
def place(folder: Path, made_folder: Path) -> Iterator[Place]:
    found = Place(folder, made_folder)
    yield found
    found.studio.close()


def test_requests_of_different_sizes_share_packs(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    from sora_train.generation.sampler import Sampler

    packs: list[int] = []
    videos = Sampler.videos

    def counted(self: Sampler, requests: Any) -> Any:
        packs.append(len(requests))
        return videos(self, requests)

    monkeypatch.setattr(Sampler, "videos", counted)
    jobs = place.work([place.ask(seconds, seed=n) for n, seconds in enumerate((2.25, 1.25, 1.75))])
    assert [len(place.video(job)) for job in jobs] == [9, 5, 7] and packs == [3]


def test_given_and_long_videos(place: Place, tmp_path: Path) -> None:
    write_mp4(tmp_path / "before.mp4", np.full((6, 64, 64, 3), 90, dtype=np.uint8), 4.0)
    write_png(tmp_path / "first.png", np.full((64, 64, 3), 200, dtype=np.uint8))
    video = place.upload((tmp_path / "before.mp4").read_bytes())
    image = place.upload((tmp_path / "first.png").read_bytes())
    jobs = place.work([place.ask(video=video), place.ask(image=image), place.ask(5.0)])
    lengths = [len(place.video(job)) for job in jobs]
    assert lengths[1:] == [5, 19] and lengths[0] > 5
    assert abs(place.video(jobs[0])[:3].astype(int) - 90).mean() < 8, "what was given is shown before"


def test_bad_media_end_as_failures_that_say_so(place: Place) -> None:
    for data in (
        b"no picture", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", b"\0\0\0\x20ftypisom" + b"x" * 99,
        b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + b"\0\1\0\0" * 2 + b"\x08\2\0\0\0" + b"\0" * 40,
    ):  # fmt: skip
        (job,) = place.work([place.ask(image=place.upload(data))])
        assert job.state == "failed" and "the upload can't be used" in job.message, job
        assert str(place.folder) not in job.message
    long = place.folder / "long.mp4"
    write_mp4(long, np.zeros((40, 32, 32, 3), dtype=np.uint8), 4.0)
    (job,) = place.work([place.ask(video=place.upload(long.read_bytes()))])
    assert job.state == "failed" and "longer than 6 seconds" in job.message


def test_a_refused_prompt_is_said_and_the_others_of_its_batch_are_made(place: Place) -> None:
    jobs = place.work([place.ask(), place.ask(prompt="some p.o.r.n"), place.ask(seed=1)])
    assert [job.state for job in jobs] == ["done", "refused", "done"] and jobs[1].message == "refused: sexual"


def test_what_was_made_before_a_kill_is_delivered_and_not_made_again(place: Place) -> None:
    (job,) = place.work([place.ask()])
    path = place.folder / "outputs" / job.file
    before = path.stat().st_mtime_ns
    with place.database._writing() as db:  # as if killed between the file and the note of it
        db.execute("UPDATE jobs SET state = 'running', ended = NULL, file = '' WHERE id = ?", (job.id,))
    (again,) = place.work([job.id])
    assert again.state == "done" and again.file == job.file and path.stat().st_mtime_ns == before


def test_a_service_that_stops_puts_its_job_back(folder: Path, made_folder: Path) -> None:
    place = Place(folder, made_folder, steps=2000)
    id = place.ask()
    worker = Worker(place.database, place.studio, 1, lambda: None)
    worker.start()
    while place.database.job(id, "ada").progress == 0:  # type: ignore[union-attr]
        time.sleep(0.02)
    worker.stop()
    job = place.database.job(id, "ada")
    assert job is not None and (job.state, job.attempts) == ("queued", 0)
    place.studio.close()


def test_a_job_is_cancelled_in_the_middle(folder: Path, made_folder: Path) -> None:
    place = Place(folder, made_folder, steps=2000)
    id = place.ask()
    worker = Worker(place.database, place.studio, 1, lambda: None)
    worker.start()
    try:
        while place.database.job(id, "ada").progress == 0:  # type: ignore[union-attr]
            time.sleep(0.02)
        assert place.database.cancel(id, "ada")
        began = time.process_time()
    finally:
        worker.stop()
    assert time.process_time() - began < 20 and list((place.folder / "outputs").iterdir()) == []
    place.studio.close()
