"""A folder of films becomes shards: every frame the right one, every drop named, the same bytes however it went."""

from __future__ import annotations

import errno
import random
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from data_tools.curation.engine import ProcessPool
from data_tools.curation.stage import Stage, attempt
from data_tools.out_lock import alone_on
from sora_train.core.cli import InputError
from sora_train.core.media import read_mp4
from sora_train.data.index.index import load_index
from sora_train.data.index.side_tables import SideTables
from sora_train.data.order.filters import Filter
from sora_train.data.read.store import Store
from tests.data_tools.curation import films, odd_work
from tests.data_tools.curation.outputs import SMALL, lines, samples, shards_of

ROOT = Path(__file__).parents[3]


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(1e-9, np.mean((one.astype(np.float64) - other) ** 2))))


def test_every_frame_of_a_clip_is_of_its_shot(out: Path) -> None:
    found = {
        (s["json"]["film"], round(s["json"]["from_s"] * 24), round(s["json"]["to_s"] * 24)): s for s in samples(out)
    }
    trim = 3  # 0.1 s at 24 frames a second
    expected = {
        ("own/copy.mp4", 0, 36 - trim): films.shot(1, 36)[: 36 - trim],
        ("own/copy.mp4", 36 + trim, 96 - trim): films.shot(2, 60, 0.5)[trim:-trim],
        ("own/copy.mp4", 96 + trim, 136): films.shot(3, 40)[trim:],
        ("own/boxed.mp4", 0, 48 - trim): films.shot(4, 48)[: 48 - trim],
        ("bought/again.mp4", 0, 40 - trim): films.shot(6, 40)[: 40 - trim],
    }
    assert set(found) == set(expected)
    for place, true in expected.items():
        frames, fps = read_mp4(found[place]["mp4"])
        assert len(frames) == len(true) and fps == 24
        height, width = frames.shape[1:3]
        assert abs(height - true.shape[1]) <= 8 and width == true.shape[2]
        top = (true.shape[1] - height) // 2
        inner = true[:, top : top + height]
        assert min(psnr(one, other) for one, other in zip(frames, inner, strict=True)) > 30


def test_everything_is_kept_dropped_or_failed_once_and_the_reasons_are_named(out: Path) -> None:
    entries = lines(out / "dropped.jsonl")
    of_films = {e["film"]: e["reason"] for e in entries if e["unit"] == "film"}
    assert of_films == {
        "found/nobodys.mp4": "no licence", "bought/page.mp4": "not a video", "bought/cut.mp4": "undecodable",
        "own/three.mp4": "copy", "own/tiny.mp4": "too small",
    }  # fmt: skip
    reasons = Counter(e["reason"] for e in entries if e["unit"] == "clip")
    assert reasons == {"near duplicate": 1, "not motion >= 0.001": 1}
    used = {e["film"] for e in lines(out / "sources.jsonl")}
    assert used == {"own/copy.mp4", "own/boxed.mp4", "bought/again.mp4"}
    assert not used & set(of_films) and len(used) + len(of_films) == 8
    shots = lines(out / "ledger/shots.jsonl")
    assert sum(len(e["kept"]["shots"]) for e in shots) == len(samples(out)) + reasons.total()


def test_scores_are_a_side_table_that_filters(out: Path) -> None:
    shards = sorted(map(str, out.glob("*.tar")))
    index = load_index(shards, captioned=False)
    assert index.usable.all() and set(index.columns["licence"]) == {"CC0-1.0", "CC-BY-4.0"}
    joined = SideTables([str(out / "scores.parquet")], Store()).join(index)
    passing = Filter("motion >= 0.002 and sharpness > 0")(lambda name: joined.columns[name], len(joined))
    assert passing.all() and not Filter("motion > 5")(lambda name: joined.columns[name], len(joined)).any()
    table = pq.read_table(out / "scores.parquet").to_pydict()
    assert len(table["key"]) == len(index) + 2 and min(table["motion"]) < 0.001


def test_the_report_shows_kept_and_dropped(out: Path) -> None:
    page = (out / "report.html").read_text()
    assert "Kept: 5" in page and "Dropped: near duplicate: 1" in page and "Dropped: not motion" in page
    assert page.count("data:image/jpeg") >= 7 and page.count("<line") >= 3
    assert "CC-BY-4.0" in page and "found/nobodys.mp4" in page


def test_the_same_command_adds_nothing_and_a_new_film_only_itself(
    out: Path, footage: Path, tmp_path: Path, curated: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, again = tmp_path / "footage", tmp_path / "out"
    shutil.copytree(footage, folder)
    shutil.copytree(out, again)
    before = shards_of(again)
    assert curated(folder, again) == 0
    assert "0 clips added, 5 in all" in capsys.readouterr().out
    assert shards_of(again) == before
    films.write(folder / "own/new.mp4", films.shot(30, 30))
    assert curated(folder, again) == 0
    assert "1 clips added, 6 in all" in capsys.readouterr().out
    after = shards_of(again)
    assert {name: after[name] for name in before} == before and len(after) == len(before) + 1
    with pytest.raises(InputError, match="was built with"):
        curated(folder, again, "crf=30")


def test_two_commands_never_share_an_output(
    out: Path, footage: Path, tmp_path: Path, curated: Callable[..., int]
) -> None:
    again = tmp_path / "out"
    shutil.copytree(out, again)
    with alone_on(again), pytest.raises(InputError, match="another command is at work in out="):
        curated(footage, again)
    assert shards_of(again) == shards_of(out) and curated(footage, again) == 0


class NoWork:
    """An engine that may not be asked."""

    def run(self, stage: Stage, items: Any, folder: Path) -> Any:
        raise AssertionError(f"{stage.name} was done again")

    def close(self) -> None:
        pass


def test_another_rule_decodes_nothing(
    out: Path, footage: Path, tmp_path: Path, curated: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    again = tmp_path / "out"
    shutil.copytree(out, again)
    monkeypatch.setattr("data_tools.curate._engine", lambda asked: NoWork())
    assert curated(footage, again, "keep=motion >= 0", "until=scores") == 0
    assert "not motion" not in (again / "dropped.jsonl").read_text()
    with pytest.raises(InputError, match="did you mean 'motion'"):
        curated(footage, again, "keep=motoin >= 0")


class Cutting(NoWork):
    """Cuts clips in this process; at clip number `full_at` the disk is full."""

    def __init__(self, full_at: int = 0) -> None:
        self.full_at = full_at

    def run(self, stage: Stage, items: Any, folder: Path) -> Any:
        assert stage.name == "cut"

        def full(*arguments: Any) -> Any:
            raise OSError(errno.ENOSPC, "No space left on device")

        for number, item in enumerate(items, 1):
            yield number - 1, attempt(replace(stage, work=full) if number == self.full_at else stage, item, folder)


def test_a_full_disk_is_said_and_the_same_command_goes_on(
    out: Path, footage: Path, tmp_path: Path, curated: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    again = tmp_path / "out"
    shutil.copytree(out, again)
    for path in [*again.glob("*.tar"), *again.glob("*.index.parquet"), again / "build.jsonl", again / "settled.json"]:
        path.unlink()
    shutil.rmtree(again / "work/cut")
    (again / "ledger/cut.jsonl").unlink()
    monkeypatch.setattr("data_tools.curate._engine", lambda asked: Cutting(full_at=3))
    with pytest.raises(InputError, match="no room in .*No space left.*make room, then give the same command"):
        curated(footage, again)
    assert len(lines(again / "ledger/cut.jsonl")) == 2 and not shards_of(again)
    monkeypatch.setattr("data_tools.curate._engine", lambda asked: Cutting())
    assert curated(footage, again) == 0
    assert shards_of(again) == shards_of(out) and len(lines(again / "ledger/cut.jsonl")) == 5


def test_one_worker_and_a_kill_give_the_same_bytes(python: str, out: Path, footage: Path, tmp_path: Path) -> None:
    place = tmp_path / "out"
    killed(python, footage, place, 1)
    assert shards_of(place) == shards_of(out) != {}
    assert most_repeated(place) == 1


@pytest.mark.campaign
@pytest.mark.timeout(1800)
def test_twenty_kills_give_the_same_bytes(python: str, out: Path, footage: Path, tmp_path: Path) -> None:
    place = tmp_path / "out"
    killed(python, footage, place, 20)
    assert shards_of(place) == shards_of(out) != {}
    assert most_repeated(place) == 1


def killed(python: str, footage: Path, place: Path, count: int) -> None:
    """Kill the command after waits of no pattern, until it has been killed so often; then let it end."""
    command = [python, "-m", "data_tools.curate", f"videos={footage}", f"out={place}", *SMALL, "workers=1"]
    rng = random.Random(count)
    for _ in range(count):
        started = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        before = len(list(place.glob("ledger/*"))) and sum(p.stat().st_size for p in place.glob("ledger/*"))
        until = time.monotonic() + 60
        while time.monotonic() < until and started.poll() is None:
            if sum(p.stat().st_size for p in place.glob("ledger/*")) > before:
                break
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.2))
        started.kill()
        started.wait()
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def most_repeated(place: Path) -> int:
    """How often the item was done that was noted most often by one stage: 1 where nothing noted was done again."""
    ledgers = [Counter(entry["of"] for entry in lines(ledger)) for ledger in place.glob("ledger/*.jsonl")]
    return max(max(noted.values()) for noted in ledgers)


def test_a_worker_that_dies_or_hangs_fails_its_item_alone(tmp_path: Path) -> None:
    stage = Stage("work", odd_work.work, ("do",), ("tests.data_tools.curation.odd_work",))
    deeds = ["a", "die", "drop", "hang", "break", "b"]  # on a busy machine all but one are given a minute
    items = [{"id": str(n), "do": do, "duration": 0 if do == "hang" else 60} for n, do in enumerate(deeds)]
    with ProcessPool(2, timeout_s=2) as pool:
        found = dict(pool.run(stage, items, tmp_path))
    assert found[0] == {"kept": {"done": "a"}} and found[5] == {"kept": {"done": "b"}}
    assert found[1]["failed"][0] == "crash" and found[3]["failed"][0] == "timeout"
    assert found[2] == {"dropped": ["a reason", "a detail"]}
    assert found[4] == {"failed": ["error", "ZeroDivisionError: by zero"]}
