"""Near-duplicates are found through re-encodes, shifts, letterboxes, mirrors and speed; unrelated clips aren't."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from data_tools.curation.borders import border_of
from data_tools.curation.duplicates import Hashed, HashIndex, aligned, find_near
from data_tools.curation.hashes import distances, from_text, hashes_of, to_text
from sora_train.core.media import encode_mp4, read_mp4
from tests.data_tools.curation import films

NEAR = 8.0


def hashed(key: str, frames_THWC: np.ndarray, shot: str = "") -> Hashed:
    """A clip's hashes, as the stages take them: small pictures twice a second, without borders."""
    gray = [
        cv2.resize(cv2.cvtColor(f, cv2.COLOR_RGB2GRAY), (228, 128), interpolation=cv2.INTER_AREA) for f in frames_THWC
    ]
    small = np.stack(gray[:: films.FPS // 2])
    border = border_of(small, 128, 228)
    inner = small[:, border.top : 128 - border.bottom, border.left : 228 - border.right]
    both = [hashes_of(np.ascontiguousarray(one)) for one in inner]
    plain, mirrored = (np.array(one, np.uint64) for one in zip(*both, strict=True))
    return Hashed(key, plain, mirrored, shot)


def encoded(crf: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda frames_THWC: read_mp4(encode_mp4(frames_THWC, films.FPS, crf))[0]


CHANGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "re-encoded": encoded(38),
    "shifted": lambda frames: frames[19:],
    "letterboxed": lambda frames: films.letterboxed(frames, 20),
    "mirrored": lambda frames: frames[:, :, ::-1],
    "faster": lambda frames: frames[(np.arange(int(len(frames) / 1.25)) * 1.25).astype(int)],
    "brighter": lambda frames: np.clip(frames.astype(np.int16) + 25, 0, 255).astype(np.uint8),
    "smaller": lambda frames: np.stack([cv2.resize(f, (128, 72), interpolation=cv2.INTER_AREA) for f in frames]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_copy_is_found(change: str) -> None:
    others = [hashed(f"other-{seed}", films.shot(200 + seed, 48)) for seed in range(3)]
    original = films.shot(100, 120, 0.8)
    found = find_near([*others, hashed("original", original), hashed("copy", CHANGES[change](original))], NEAR, 12)
    assert list(found.dropped) == ["copy"] and found.dropped["copy"][0] == "original"
    assert found.index.keys == ["other-0", "other-1", "other-2", "original"]


def test_unrelated_clips_and_parts_of_one_shot_stay() -> None:
    clips = [hashed(str(seed), films.shot(300 + seed, 48)) for seed in range(17)]  # 136 pairs
    assert not find_near(clips, NEAR, 12).dropped
    whole = films.shot(400, 96, 0.02)
    assert not find_near([hashed("a", whole[:48], "one"), hashed("b", whole[48:], "one")], NEAR, 12).dropped
    assert find_near([hashed("a", whole[:48], "one"), hashed("b", whole[48:], "two")], NEAR, 12).dropped


def test_alignment_and_texts() -> None:
    rng = np.random.default_rng(0)
    film = rng.integers(0, 2**63, 40).astype(np.uint64)
    assert aligned(film[10:20], film) == 0 and aligned(film, film[10:20]) == 0 and aligned(film[:5], film[3:]) > 20
    assert (from_text(to_text(film.tolist())) == film).all()
    picture = films.shot(1, 1)[0, :, :, 0].copy()
    plain, mirrored = hashes_of(picture)
    flipped = hashes_of(np.ascontiguousarray(picture[:, ::-1]))
    near = distances(np.array([plain, mirrored], np.uint64), np.array(flipped[::-1], np.uint64))
    assert near.max() <= 2  # the hash of the mirror image is the one that was foretold


def test_an_index_is_kept_in_a_file(tmp_path: Path) -> None:
    index = HashIndex()
    clips = [hashed(str(seed), films.shot(500 + seed, 48)) for seed in range(4)]
    for clip in clips:
        index.add(clip)
    index.write(tmp_path / "hashes.parquet")
    match = HashIndex.read(tmp_path / "hashes.parquet").nearest(clips[2])
    assert match is not None and match.number == 2 and match.bits == 0


@pytest.mark.campaign
def test_a_hundred_thousand_clips_are_asked_within_50_ms() -> None:
    rng = np.random.default_rng(0)
    index = HashIndex()
    for number in range(100_000):
        hashes = rng.integers(0, 2**64, 12, dtype=np.uint64)
        index.add(Hashed(str(number), hashes, hashes))
    asked = Hashed("asked", index._bank[12_000:12_012].copy(), rng.integers(0, 2**64, 12, dtype=np.uint64))
    times = []
    for _ in range(9):
        start = time.process_time()
        match = index.nearest(asked)
        times.append(time.process_time() - start)
    assert match is not None and match.number == 1000
    assert sorted(times)[4] < 0.05
