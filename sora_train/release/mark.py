"""A built-in invisible mark: 48 bits in the brightness of a video, found again after it was encoded anew.

A bit is the sign of a keyed sum of the video's spatial frequencies. The frequencies are those of the whole picture (a
cosine transform of the brightness, averaged over time), so another resolution, frame rate, codec or cut in time leaves
them where they are. Embedding changes the picture as little as it can: a bit whose sum has the right sign with enough
margin already costs nothing. The margin is the largest one that the strength (a root mean square of brightness levels)
pays for. Cropping, mirroring and rotating move the frequencies and remove the mark; so does anybody who has the key.

Informed embedding: I. J. Cox, M. L. Miller and A. L. McKellips, "Watermarking as communications with side information",
Proceedings of the IEEE 87 (1999).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import chain

import numpy as np
from scipy.ndimage import uniform_filter

BITS = 48
ENOUGH = 40  # bits that must agree with a known id: chance alone does it once in 580,000 times
STRENGTHS = (1.5, 2.5, 4.0)
SMALLEST = 32  # pixels a side
# Frequencies used, in half cycles per picture, by the size of their grid; and pixels a side that a grid needs.
_BANDS = {128: (14, 160), 96: (12, 120), 64: (9, 80), 32: (4, 40)}
_ROOM = {128: 360, 96: 140, 64: 60, 32: SMALLEST}
PRESENT = 60.0  # sum of the bits' clipped strengths; unmarked 38 with a deviation of 4
_CLIP = 3.0  # of a bit, and of a frequency: a few strong lines of the picture must not decide
_AROUND = 7  # frequencies a side that a weight looks at
_FLOOR = 2.0  # of a frequency's size: below it the codec's noise is larger than the picture
_ROUNDS = 3
_PASSES = 2  # over a picture, each with a part of the strength
_SMOOTH_TO_ROUGH = (1.0, 12.0)  # deviation of brightness around a place, between which its share grows
_MASKING = 0.8  # how much the share grows
_RGB = np.array((0.299, 0.587, 0.114))  # brightness (BT.601)


@dataclass(frozen=True)
class Found:
    """Result of reading a mark: the decoded id, and how strongly the video shows a mark."""

    id: str  # 12 hexadecimal digits
    strength: float
    present: bool  # more than chance and pictures alone give

    def agreeing(self, other: str) -> int:
        """Number of bits that agree with an id."""
        return BITS - (int(self.id, 16) ^ int(other, 16)).bit_count()

    def is_that(self, other: str) -> bool:
        """Tell whether a mark is there and its id is `other`, up to a few bits."""
        return self.present and self.agreeing(other) >= ENOUGH


class ClassicalMark:
    """The mark under a secret key."""

    name = "classical-1"
    strengths = STRENGTHS

    def __init__(self, key: bytes) -> None:
        self._key = key

    def embedded(self, pieces: Iterable[np.ndarray], id: str, strength: float) -> Iterator[np.ndarray]:
        """The frames `(T, H, W, 3)` uint8 with the mark, piece by piece; unchanged where they are too small for it."""
        for frames_THWC in pieces:
            yield self._marked(frames_THWC, id, strength)

    def found(self, pieces: Iterable[np.ndarray]) -> Found:
        """The mark of a video."""
        best = Found("0" * (BITS // 4), 0.0, False)
        mean_HW = _mean(pieces)
        for grid, (_, highest) in _BANDS.items():  # a picture that was made smaller keeps the grid that it had
            if 2 * max(mean_HW.shape) < highest:  # most of its frequencies are in no picture of this size
                continue
            kernel = _kernel(self._key, grid)
            sums = kernel.sums(_spectrum(mean_HW, grid))
            strength = float(np.minimum(np.abs(sums), _CLIP).sum())
            if strength > best.strength:
                id = int("".join("1" if s > 0 else "0" for s in sums), 2)
                best = Found(f"{id:0{BITS // 4}x}", strength, strength >= PRESENT)
        return best

    def _marked(self, frames_THWC: np.ndarray, id: str, strength: float) -> np.ndarray:
        height, width = frames_THWC.shape[1:3]
        grid = next((grid for grid, room in _ROOM.items() if min(height, width) >= room), None)
        if grid is None:
            return frames_THWC
        kernel = _kernel(self._key, grid)
        signs = np.array([1.0 if bit == "1" else -1.0 for bit in f"{int(id, 16):0{BITS}b}"])
        mean_HW = _mean([frames_THWC])
        share_HW = _tolerance(mean_HW, grid)
        rows, columns = _cosines(height, grid), _cosines(width, grid)
        added_HW = np.zeros_like(mean_HW)
        for _ in range(_PASSES):  # a share that differs from place to place mixes the frequencies: look again
            change = kernel.change(_spectrum(mean_HW + added_HW, grid), signs, strength * grid / _PASSES)
            added_HW += share_HW * (rows.T @ change @ columns) * ((height * width) ** 0.5 / grid)
        added_HW = np.rint(added_HW)
        more, less = (
            np.repeat(np.clip(part, 0, 255).astype(np.uint8)[..., None], 3, axis=2) for part in (added_HW, -added_HW)
        )
        marked = np.empty_like(frames_THWC)
        for place, frame in enumerate(frames_THWC):  # in bytes, which is several times as fast as in wider numbers
            np.add(frame, np.minimum(more, ~frame), out=marked[place])
            marked[place] -= np.minimum(less, marked[place])
        return marked


@dataclass(frozen=True)
class _Kernel:
    """Frequencies of every bit, with their signs; no frequency belongs to two bits."""

    places: np.ndarray  # (frequencies, 2)
    bit: np.ndarray  # (frequencies,)
    sign: np.ndarray  # (frequencies,)

    def sums(self, spectrum: np.ndarray) -> np.ndarray:
        """The keyed sum of each bit, in deviations of what such sums are in pictures without a mark."""
        values = np.clip(self._of(spectrum) * self.weights(spectrum), -_CLIP, _CLIP) * self.sign
        values = values / (np.sqrt(np.mean(values**2)) + 1e-9)
        return np.bincount(self.bit, values, BITS) / np.bincount(self.bit, minlength=BITS) ** 0.5

    def change(self, spectrum: np.ndarray, signs: np.ndarray, length: float) -> np.ndarray:
        """The change of the spectrum, of at most this length, that gives all bits the same and largest margin."""
        changed = np.zeros_like(spectrum)
        for _ in range(_ROUNDS):  # the weights are those of the picture with its mark
            weights = self.weights(spectrum + changed)
            keyed = weights * self.sign
            held = np.bincount(self.bit, self._of(spectrum) * keyed, BITS) * signs
            norms = np.bincount(self.bit, weights**2, BITS)
            step = _largest_margin(held, norms, length) / norms * signs
            changed[self.places[:, 0], self.places[:, 1]] = step[self.bit] * keyed
        return changed

    def weights(self, spectrum: np.ndarray) -> np.ndarray:
        """Weight of each frequency: less where the picture itself is strong around it."""
        around = uniform_filter(np.abs(spectrum), _AROUND, mode="nearest")
        return 1.0 / (self._of(around) + _FLOOR)

    def _of(self, spectrum: np.ndarray) -> np.ndarray:
        found: np.ndarray = spectrum[self.places[:, 0], self.places[:, 1]]
        return found


def _largest_margin(held: np.ndarray, norms: np.ndarray, length: float) -> np.ndarray:
    """Amount that each bit lacks to the largest margin that a change of this length reaches."""
    order = np.argsort(held)
    h, n = held[order], norms[order]
    # with the k lowest bits raised to m: m^2 a - 2 m b + c = length^2
    a, b, c = np.cumsum(1 / n), np.cumsum(h / n), np.cumsum(h**2 / n)
    margins = (b + np.sqrt(np.maximum(0.0, b**2 - a * (c - length**2)))) / a
    raised = np.flatnonzero(margins >= h)  # one bit can always be raised
    return np.maximum(0.0, margins[raised[-1]] - held)


@cache
def _kernel(key: bytes, grid: int) -> _Kernel:
    """The kernel of a key; the same on every machine, since the order comes from a hash."""
    low, high = _BANDS[grid]
    v, u = np.mgrid[:grid, :grid]
    radius = np.hypot(v, u)
    inside = np.argwhere((radius >= low) & (radius <= high))
    numbers = np.frombuffer(hashlib.shake_256(key + bytes((grid,))).digest(8 * len(inside)), "<u8")
    order = np.argsort(numbers, kind="stable")
    places = inside[order]
    signs = np.where(numbers[order] & np.uint64(1), 1.0, -1.0)
    return _Kernel(places, np.arange(len(places)) % BITS, signs)


def _tolerance(mean_HW: np.ndarray, grid: int) -> np.ndarray:
    """The share of a change that each place of a picture takes, 1 in the mean square: less where it is smooth."""
    side = max(3, min(mean_HW.shape) // grid * 4 + 1)
    centre_HW = uniform_filter(mean_HW, side, mode="nearest")
    deviation_HW = np.sqrt(np.maximum(0.0, uniform_filter(mean_HW**2, side, mode="nearest") - centre_HW**2))
    share_HW = uniform_filter(np.clip(deviation_HW, *_SMOOTH_TO_ROUGH), side, mode="nearest") ** _MASKING
    share_HW /= np.sqrt(np.mean(share_HW**2))
    return share_HW


def _mean(pieces: Iterable[np.ndarray]) -> np.ndarray:
    """The brightness of a video averaged over time, `(H, W)`."""
    total: np.ndarray | None = None
    count = 0
    for frame in chain.from_iterable(pieces):
        total = np.zeros(frame.shape, dtype=np.int64) if total is None else total
        total += frame
        count += 1
    if total is None:
        raise ValueError("a video without frames has no mark")
    return total @ _RGB / count


def _spectrum(mean_HW: np.ndarray, grid: int) -> np.ndarray:
    """The lowest `grid` x `grid` cosine coefficients, in the scale of a picture of that many pixels."""
    height, width = mean_HW.shape
    rows, columns = _cosines(height, grid), _cosines(width, grid)
    return rows @ mean_HW @ columns.T * grid / (height * width) ** 0.5


@cache
def _cosines(pixels: int, grid: int) -> np.ndarray:
    """The first `grid` orthonormal cosines over so many pixels, `(grid, pixels)` (DCT-II); 0 where there are fewer."""
    n, k = np.arange(pixels), np.arange(grid)[:, None]
    waves = np.cos(np.pi * (n + 0.5) * k / pixels) * (2.0 / pixels) ** 0.5
    waves[0] /= 2.0**0.5
    waves[pixels:] = 0.0
    return waves
