"""Bad input is normal: counted by cause, named, never a stop or a hang, never trained on altered, never executed."""

from __future__ import annotations

import hashlib
import io
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sora_train.config.schema import Probe
from sora_train.core.batch import Clip
from sora_train.core.cost import Cost, Geometry
from sora_train.data.index.index import Index, load_index
from sora_train.data.index.make import index_shards
from sora_train.data.loader import Loader, Step
from sora_train.data.order.plan import Plan, PlanInputs, Position
from sora_train.data.read.decode import DecodeError
from sora_train.data.read.pool import Pool, _Child
from tests.conftest import sample, write_shard
from tests.data.deadlines import Deadlines
from tests.faults.bad_decoder import BOTH, CRASH, EAT, SPIN
from tests.faults.bad_files import HARMLESS, MARKER, TARS, Corpus, damaged_tar, hostile_names

GOOD = sample(2)  # 17 frames of 64x64


class Listener:
    """Counts connections to a port of this machine."""

    def __init__(self) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port, self.hits = self.socket.getsockname()[1], 0
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            try:
                self.socket.accept()[0].close()
            except OSError:
                return
            self.hits += 1


@pytest.fixture
def listener() -> Iterator[Listener]:
    listener = Listener()
    yield listener
    listener.socket.close()


def epoch(index: Index, pool: Pool) -> list[Step]:
    """All steps of one epoch of an index."""
    repeats = (1.0,) * len(index.shards)
    tasks = (("text_to_video", 1.0),)
    inputs = PlanInputs(1, 4, 256, 0.9, 4096, 8.0, 17, 1024, "stretch", tasks, repeats, Geometry(4, 4, 2), Cost(1, 1))
    plan = Plan(index, inputs)
    count = sum(len(plan.steps(0, w)) for w in range(len(plan.windows(0))))
    return list(islice(Loader(plan, pool, [[0, 1, 2, 3]], Position(), 2), count))


def clips_of(steps: list[Step]) -> dict[str, str]:
    """A hash of each clip's pixels, by key."""
    clips: list[Clip] = [clip for step in steps for pack in step.packs for clip in pack.clips]
    return {c.key: hashlib.sha256(np.ascontiguousarray(c.video_TCHW.numpy()).tobytes()).hexdigest() for c in clips}


def write_corpus(folder: Path, port: int, each: int, seed: int) -> tuple[list[str], dict[str, str]]:
    """Shards of `each` bad samples of every kind between good ones, and the kind of every bad key."""
    rng = random.Random(seed)
    video = GOOD["mp4"]
    assert isinstance(video, bytes)
    corpus = Corpus(video, folder, port)
    kinds, entries = {}, []
    for kind, make in corpus.samples.items():
        for number in range(each):
            key = f"{kind}-{number}"
            kinds[key] = kind
            entries.append({"__key__": key, **make(rng)})
    shards = []
    for number, start in enumerate(range(0, len(entries), 100)):
        mixed = [{**GOOD, "__key__": f"good-{number}-{n}"} for n in range(10)] + entries[start : start + 100]
        rng.shuffle(mixed)
        shards.append(write_shard(folder / f"bad-{number:03d}.tar", mixed))
    good = {"mp4": video, "txt": b"a"}
    hostile_names(Path(shards[0]), [(f"{'../' * 9}{folder}/{MARKER}", good), ("/abs/key", good)])
    return shards, kinds


def check_corpus(folder: Path, listener: Listener, each: int, seed: int) -> Counter[str]:
    """Index and load a corpus; everything is accounted for, nothing ran, nothing called out. Returns the causes."""
    shards, kinds = write_corpus(folder, listener.port, each, seed)
    before = set(folder.rglob("*"))
    index_shards(shards, workers=2)
    index = load_index(shards)
    refused = dict(zip(index.key.tolist(), index.refused.tolist(), strict=True))
    assert all(refused[key] for key, kind in kinds.items() if kind not in HARMLESS)
    assert not any(cause for key, cause in refused.items() if key.startswith("good") or "abs" in key)
    with Pool(2, timeout_s=120) as pool:
        steps = epoch(index, pool)
    clips = clips_of(steps)
    lost = Counter(r.cause for step in steps for r in step.refused)
    assert len(clips) + lost.total() == int(index.usable.sum()), "each sample arrived or was refused by name"
    assert {clips[key] for key in clips if key.startswith("good")} == {clips["good-0-0"]}
    assert len([key for key in clips if key.startswith("good")]) == 10 * len(shards)
    assert listener.hits == 0, "no playlist was followed"
    assert not list(folder.rglob(MARKER)) and not Path(MARKER).exists(), "no payload ran, no name led to a file"
    made = set(folder.rglob("*")) - before
    assert {path.suffix for path in made} == {".parquet"}
    return Counter(cause for cause in refused.values() if cause) + lost


def test_every_kind_of_bad_sample_is_counted_and_everything_good_arrives(tmp_path: Path, listener: Listener) -> None:
    causes = check_corpus(tmp_path, listener, each=1, seed=0)
    assert causes.total() >= 28
    assert {"not_a_video", "no_caption", "caption_json", "pixels", "empty", "no_media"} <= set(causes)


@pytest.mark.campaign
@pytest.mark.timeout(3600)
def test_a_thousand_bad_samples(tmp_path: Path, listener: Listener) -> None:
    start = time.monotonic()
    causes = check_corpus(tmp_path, listener, each=25, seed=1)
    print(f"\n{causes.total()} refused in {time.monotonic() - start:.0f} s: {dict(causes.most_common())}")


@pytest.mark.parametrize("kind", TARS)
def test_a_damaged_tar_loses_what_is_damaged_and_says_so(own_corpus: list[str], kind: str) -> None:
    rng = random.Random(kind)
    whole = Path(own_corpus[0]).read_bytes()
    keys = {str(key) for key in load_index(own_corpus[:1]).key}
    for _ in range(3):
        Path(own_corpus[0]).write_bytes(damaged_tar(kind, whole, rng))
        index_shards(own_corpus[:2], workers=1)
        index = load_index(own_corpus[:2])
        mine = index.shard == 0
        usable, causes = set(index.key[mine & index.usable]), set(index.refused[mine]) - {""}
        assert usable <= keys and index.usable[~mine].all()
        assert usable == keys or causes, f"{keys - usable} lost without a word"


def test_no_clip_that_was_altered_behind_its_index_is_ever_trained_on(own_corpus: list[str]) -> None:
    index = load_index(own_corpus)
    rng = random.Random(7)
    for shard in own_corpus:
        data = bytearray(Path(shard).read_bytes())
        rows = np.flatnonzero(index.shard == own_corpus.index(shard))
        for row in rng.sample(rows.tolist(), 4):
            data[int(index.offset[row]) + rng.randrange(int(index.size[row]))] ^= 1 << rng.randrange(8)
        Path(shard).write_bytes(data)
    index_shards(own_corpus, workers=1)
    assert load_index(own_corpus).fingerprint == index.fingerprint, "the checksums of what was indexed are kept"
    with Pool(1, timeout_s=120) as pool:
        steps = epoch(index, pool)
    assert Counter(r.cause for step in steps for r in step.refused) == {"checksum": 12}
    assert len(clips_of(steps)) == 12


def test_damage_inside_a_picture_passes_an_index_of_headers_and_is_refused_and_counted_when_it_is_decoded(
    tmp_path: Path,
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG")
    cut = buffer.getvalue()[: len(buffer.getvalue()) // 2]
    entries = [{**GOOD, "__key__": f"good-{n}"} for n in range(3)] + [{"__key__": "cut", "jpg": cut, "txt": b"noise"}]
    shard = write_shard(tmp_path / "s.tar", entries)
    index_shards([shard], workers=1, probe=Probe.packets)
    index = load_index([shard])
    assert index.usable.all() and (index.width[3], index.height[3]) == (64, 64)
    with Pool(1, timeout_s=120) as pool:
        steps = epoch(index, pool)
    refused = [(r.key, r.cause) for step in steps for r in step.refused]
    assert refused == [("cut", "undecodable")] and set(clips_of(steps)) == {"good-0", "good-1", "good-2"}
    index_shards([shard], workers=1, probe=Probe.frame)
    assert load_index([shard]).refused.tolist() == ["", "", "", "undecodable"]


@pytest.fixture
def bad_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Child, "module", "tests.faults.bad_decoder")


@pytest.mark.parametrize(
    ("ending", "cause"),
    [
        (SPIN, None),
        (CRASH, None),
        pytest.param(BOTH + SPIN, "timeout", marks=pytest.mark.campaign),
        (BOTH + CRASH, "crash"),
        (EAT, "memory"),
    ],
)
def test_a_decoder_that_spins_dies_or_eats_memory_is_replaced(
    bad_decoder: None, tmp_path: Path, deadlines: Deadlines, ending: bytes, cause: str | None
) -> None:
    video = GOOD["mp4"]
    assert isinstance(video, bytes)
    good, bad = tmp_path / "good.mp4", tmp_path / "bad.mp4"
    good.write_bytes(video)
    bad.write_bytes(video + ending)
    with Pool(1, timeout_s=120, memory_bytes=2 << 30) as pool:

        def ask(path: Path) -> np.ndarray:
            return pool.decode(str(path), "mp4", (0, -1, None), [0, 8, 16], (64, 64), (0, 0, 64, 64)).result()  # type: ignore[arg-type]

        before = ask(good)
        spins = SPIN in ending
        deadlines(lambda request: 1.5 if spins and not (cause is None and request["spare"]) else 120.0)
        if cause is None:
            assert np.abs(ask(bad).astype(int) - before).max() <= 2, "the second back end steps in"
        else:
            with pytest.raises(DecodeError) as caught:
                ask(bad)
            assert caught.value.cause == cause
        deadlines(lambda request: 120.0)
        assert np.array_equal(ask(good), before), "the next request is unharmed"
