"""Planted copies are found, whatever was done to them; others are not."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from sora_train.core.media import encode_mp4, read_mp4
from sora_train.evaluation.memorisation import COPY, distance, hashes, nearest_clips


def scene(seed: int, frames: int = 48) -> np.ndarray:
    """A drifting texture, unlike that of any other seed."""
    rng = np.random.default_rng(seed)
    field = gaussian_filter(rng.normal(size=(96, 96 + 2 * frames, 3)), (9, 9, 0))
    field = (field - field.min()) / (field.max() - field.min()) * 255
    return np.stack([field[:72, 2 * t : 2 * t + 96] for t in range(frames)]).astype(np.uint8)


CLIPS = {f"clip-{n}": scene(n) for n in range(6)}
CHANGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "the same": lambda v: v,
    "encoded again": lambda v: read_mp4(encode_mp4(v, 8.0, crf=36))[0],
    "a second later": lambda v: v[8:],
    "mirrored": lambda v: v[:, :, ::-1],
    "letterboxed": lambda v: np.pad(v, ((0, 0), (12, 12), (0, 0), (0, 0))),
    "a little darker": lambda v: (v * 0.9).astype(np.uint8),
    "smaller": lambda v: v[:, ::2, ::2],
}


@pytest.fixture(scope="module")
def known() -> list[tuple[str, np.ndarray]]:
    return [(name, hashes(video, 8.0)) for name, video in CLIPS.items()]


@pytest.mark.parametrize("change", CHANGES)
def test_a_planted_copy_is_found(known: list[tuple[str, np.ndarray]], change: str) -> None:
    samples = {name: hashes(np.ascontiguousarray(CHANGES[change](video)), 8.0) for name, video in CLIPS.items()}
    found = {match.sample: match for match in nearest_clips(samples, known)}
    assert all(match.clip == name and match.distance <= COPY for name, match in found.items()), found
    assert all(match.mirrored == (change == "mirrored") for match in found.values())
    assert all(match.shift_s == (1.0 if change == "a second later" else 0.0) for match in found.values())


def test_others_are_not(known: list[tuple[str, np.ndarray]]) -> None:
    """None of 120 unrelated pairs."""
    samples = {str(n): hashes(scene(100 + n), 8.0) for n in range(20)}
    assert min(match.distance for match in nearest_clips(samples, known)) > COPY


def test_short_videos_and_pictures_are_compared_too() -> None:
    short = scene(0)[:3]
    assert hashes(short, 8.0).shape == (2, 3, 64)
    assert distance(hashes(short, 8.0), hashes(short, 8.0))[0] == 0.0
    assert distance(hashes(short[:1], 0.0), hashes(short[:1], 0.0))[0] == 0.0
