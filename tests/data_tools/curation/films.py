"""Films that are made up: shots of moving texture joined by cuts, dissolves, fades, flashes and pans."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from sora_train.core.media import write_mp4

FPS = 24
HEIGHT, WIDTH = 144, 256
_ROOM = 3  # how much larger than the picture a shot's world is


class Film(NamedTuple):
    """Frames, and the first frame of each shot but the first, after what."""

    frames_THWC: np.ndarray
    cuts: list[int]


def world(seed: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """A large picture of soft patches and sharp shapes, another for every seed."""
    rng = np.random.default_rng(seed)
    tall, broad = _ROOM * height, _ROOM * width
    base = np.zeros((tall, broad, 3), np.float32)
    for cells in (3, 9, 27):
        noise = rng.uniform(-1, 1, (cells, cells, 3)).astype(np.float32)
        base += cv2.resize(noise, (broad, tall), interpolation=cv2.INTER_CUBIC) * (40 / (cells / 3) ** 0.5)
    picture = np.clip(base + rng.uniform(70, 180, 3), 30, 225).astype(np.uint8)
    for _ in range(40):
        centre = int(rng.integers(broad)), int(rng.integers(tall))
        colour = tuple(int(c) for c in rng.integers(30, 225, 3))
        cv2.circle(picture, centre, int(rng.integers(height // 20, height // 5)), colour, -1)
    return picture


def shot(
    seed: int, frames: int, speed: float = 1.5, height: int = HEIGHT, width: int = WIDTH, start: float = 0.0
) -> np.ndarray:
    """A camera that moves over a world at `speed` pixels a frame, `(T, H, W, 3)`."""
    picture = world(seed, height, width)
    angle = np.random.default_rng(seed + 1).uniform(0, 2 * np.pi)
    found = []
    for number in range(frames):
        along = start + speed * number
        left = width + np.clip(along * np.cos(angle), -width, width)
        top = height + np.clip(along * np.sin(angle), -height, height)
        matrix = np.array([[1, 0, -left], [0, 1, -top]], np.float32)
        found.append(cv2.warpAffine(picture, matrix, (width, height), flags=cv2.INTER_LINEAR))
    return np.stack(found)


def still(seed: int, frames: int) -> np.ndarray:
    """A shot in which nothing moves."""
    return np.repeat(shot(seed, 1), frames, axis=0)


def joined(shots: Sequence[np.ndarray]) -> Film:
    """Shots one after the other, by cuts."""
    return Film(np.concatenate(list(shots)), np.cumsum([len(one) for one in shots])[:-1].tolist())


def dissolved(one: np.ndarray, other: np.ndarray, frames: int) -> np.ndarray:
    """Two shots of which the last and the first `frames` frames blend."""
    share = (np.arange(1, frames + 1) / (frames + 1))[:, None, None, None]
    blend = one[-frames:] * (1 - share) + other[:frames] * share
    return np.concatenate([one[:-frames], blend.round().astype(np.uint8), other[frames:]])


def flashed(film_THWC: np.ndarray, first: int, frames: int) -> np.ndarray:
    """A film with some frames nearly white."""
    changed = film_THWC.copy()
    changed[first : first + frames] = 255 - (255 - changed[first : first + frames]) // 5
    return changed


def letterboxed(film_THWC: np.ndarray, rows: int) -> np.ndarray:
    """A film with black rows above and below."""
    return np.pad(film_THWC, ((0, 0), (rows, rows), (0, 0), (0, 0)))


def write(path: Path, frames_THWC: np.ndarray, fps: float = FPS, crf: int = 20, gop: int = 48) -> Path:
    """Write a film."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_mp4(path, frames_THWC, fps, crf, gop)
    return path
