"""Perceptual hashes of pictures: 64 bits of a cosine transform, nearly the same over re-encodes and sizes."""

from __future__ import annotations

import cv2
import numpy as np

_SIDE, _KEPT = 32, 8
_MIRROR = np.where(np.arange(_KEPT) % 2, -1.0, 1.0)  # signs of horizontal frequencies in a mirrored picture
_WEIGHTS = np.uint64(1) << np.arange(_KEPT * _KEPT, dtype=np.uint64)


def hashes_of(gray_HW: np.ndarray) -> tuple[int, int]:
    """The hashes of a picture and of its mirror image."""
    small = cv2.resize(gray_HW, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA).astype(np.float32)
    low = cv2.dct(small)[:_KEPT, :_KEPT].astype(np.float64)
    return _bits(low), _bits(low * _MIRROR)


def _bits(low: np.ndarray) -> int:
    low = low.copy()
    low[0, 0] = 0.0  # the mean brightness
    return int(_WEIGHTS[(low > np.median(low)).ravel()].sum(dtype=np.uint64))


def to_text(hashes: list[int]) -> str:
    """Hashes as text, 16 hexadecimal digits each."""
    return "".join(f"{one:016x}" for one in hashes)


def from_text(text: str) -> np.ndarray:
    """Parse hashes from their text, as uint64."""
    return np.array([int(text[at : at + 16], 16) for at in range(0, len(text), 16)], dtype=np.uint64)


def distances(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Number of bits that differ between hashes, elementwise (broadcast)."""
    return np.bitwise_count(one ^ other)
