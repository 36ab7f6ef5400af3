"""Built-in invisible mark (watermark): 48 bits in the brightness of a video that survive re-encoding.

Each bit is the sign of a keyed sum of spatial frequencies: coefficients of a cosine transform (DCT) of the full frame's
brightness, averaged over time. A change of resolution, frame rate, codec or length therefore leaves the frequencies
where they are. Embedding changes the picture as little as possible: a bit whose sum already has the right sign with
enough margin is left alone. The margin is the largest that the strength allows; the strength is the root mean square
of the change, in brightness levels. Cropping, mirroring and rotating move the frequencies and so remove the mark.
Whoever has the key can remove it too.

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
SMALLEST = 32  # shortest side of a picture that can be marked, pixels
# By grid size: the lowest and the highest frequency used, in half cycles per picture; and the shortest side in pixels.
_BANDS = {128: (14, 160), 96: (12, 120), 64: (9, 80), 32: (4, 40)}
_ROOM = {128: 360, 96: 140, 64: 60, 32: SMALLEST}
PRESENT = 60.0  # least sum of the bits' clipped strengths; without a mark 38 with a deviation of 4
_CLIP = 3.0  # limit of a bit's and of a frequency's value, so that a few strong frequencies don't decide
_AROUND = 7  # side of the window of frequencies that determines a weight
_FLOOR = 2.0  # added to a frequency's magnitude: below it the codec's noise is larger than the picture
_ROUNDS = 3
_PASSES = 2  # embedding passes over a picture, each with an equal part of the strength
_SMOOTH_TO_ROUGH = (1.0, 12.0)  # local deviations of brightness between which a pixel's share of the change grows
_MASKING = 0.8  # exponent of that growth
_RGB = np.array((0.299, 0.587, 0.114))  # brightness (BT.601)


@dataclass(frozen=True)
class Found:
    """Result of reading a mark: the decoded id, and how strongly the video shows a mark."""

    id: str  # 12 hexadecimal digits
    strength: float
    present: bool  # whether the strength exceeds that of videos without a mark

    def agreeing(self, other: str) -> int:
        """Number of bits that agree with an id."""
        return BITS - (int(self.id, 16) ^ int(other, 16)).bit_count()

    def is_that(self, other: str) -> bool:
        """Tell whether a mark is present and its id agrees with `other` in at least `ENOUGH` bits."""
        return self.present and self.agreeing(other) >= ENOUGH


class ClassicalMark:
    """Embeds and detects the mark with a secret key."""

    name = "classical-1"
    strengths = STRENGTHS

    def __init__(self, key: bytes) -> None:
        self._key = key

    def embedded(self, pieces: Iterable[np.ndarray], id: str, strength: float) -> Iterator[np.ndarray]:
        """Embed the mark piece by piece; pieces whose frames are too small for it stay unchanged.

        Args:
            pieces: Frames `(T, H, W, 3)` uint8.
            id: 12 hexadecimal digits.
            strength: Root mean square of the change, in brightness levels.
        """
        for frames_THWC in pieces:
            yield self._marked(frames_THWC, id, strength)

    def found(self, pieces: Iterable[np.ndarray]) -> Found:
        """Detect the mark of a video from its frames `(T, H, W, 3)`, at the grid that shows it most strongly."""
        best = Found("0" * (BITS // 4), 0.0, False)
        mean_HW = _mean(pieces)
        for grid, (_, highest) in _BANDS.items():  # a scaled-down video keeps the grid of its original size
            if 2 * max(mean_HW.shape) < highest:  # this size lacks most of the grid's frequencies
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
        for _ in range(_PASSES):  # the share varies over the picture, which mixes frequencies: measure again
            change = kernel.change(_spectrum(mean_HW + added_HW, grid), signs, strength * grid / _PASSES)
            added_HW += share_HW * (rows.T @ change @ columns) * ((height * width) ** 0.5 / grid)
        added_HW = np.rint(added_HW)
        more, less = (
            np.repeat(np.clip(part, 0, 255).astype(np.uint8)[..., None], 3, axis=2) for part in (added_HW, -added_HW)
        )
        marked = np.empty_like(frames_THWC)
        for place, frame in enumerate(frames_THWC):  # uint8 is several times as fast as wider types
            np.add(frame, np.minimum(more, ~frame), out=marked[place])
            marked[place] -= np.minimum(less, marked[place])
        return marked


@dataclass(frozen=True)
class _Kernel:
    """Frequencies of every bit, with their signs; no frequency belongs to two bits."""

    places: np.ndarray  # (frequencies, 2): row and column in the spectrum
    bit: np.ndarray  # (frequencies,): number of its bit
    sign: np.ndarray  # (frequencies,): 1 or -1

    def sums(self, spectrum: np.ndarray) -> np.ndarray:
        """Keyed sum of each bit, `(BITS,)`, in standard deviations of such sums without a mark."""
        values = np.clip(self._of(spectrum) * self.weights(spectrum), -_CLIP, _CLIP) * self.sign
        values = values / (np.sqrt(np.mean(values**2)) + 1e-9)
        return np.bincount(self.bit, values, BITS) / np.bincount(self.bit, minlength=BITS) ** 0.5

    def change(self, spectrum: np.ndarray, signs: np.ndarray, length: float) -> np.ndarray:
        """Change of the spectrum, of norm at most `length`, that makes the smallest margin of all bits the largest.

        Args:
            spectrum: Coefficients of the picture, `(grid, grid)`.
            signs: Wanted sign of each bit, 1 or -1.
            length: Euclidean norm.
        """
        changed = np.zeros_like(spectrum)
        for _ in range(_ROUNDS):  # the weights depend on the change: iterate
            weights = self.weights(spectrum + changed)
            keyed = weights * self.sign
            held = np.bincount(self.bit, self._of(spectrum) * keyed, BITS) * signs
            norms = np.bincount(self.bit, weights**2, BITS)
            step = _largest_margin(held, norms, length) / norms * signs
            changed[self.places[:, 0], self.places[:, 1]] = step[self.bit] * keyed
        return changed

    def weights(self, spectrum: np.ndarray) -> np.ndarray:
        """Weight of each frequency: smaller if the picture itself is strong at neighbouring frequencies."""
        around = uniform_filter(np.abs(spectrum), _AROUND, mode="nearest")
        return 1.0 / (self._of(around) + _FLOOR)

    def _of(self, spectrum: np.ndarray) -> np.ndarray:
        found: np.ndarray = spectrum[self.places[:, 0], self.places[:, 1]]
        return found


def _largest_margin(held: np.ndarray, norms: np.ndarray, length: float) -> np.ndarray:
    """Amount to raise each bit by, so that the smallest margin is the largest that a change of norm `length` reaches.

    Args:
        held: Margin that each bit has already; negative if its sign is wrong.
        norms: Sum of the squared weights of each bit's frequencies.
        length: Euclidean norm of the change.
    """
    order = np.argsort(held)
    h, n = held[order], norms[order]
    # with the k lowest bits raised to m: m^2 a - 2 m b + c = length^2
    a, b, c = np.cumsum(1 / n), np.cumsum(h / n), np.cumsum(h**2 / n)
    margins = (b + np.sqrt(np.maximum(0.0, b**2 - a * (c - length**2)))) / a
    raised = np.flatnonzero(margins >= h)  # one bit can always be raised
    return np.maximum(0.0, margins[raised[-1]] - held)


@cache
def _kernel(key: bytes, grid: int) -> _Kernel:
    """Build the kernel of a key and a grid. It is the same on every machine, since a hash orders the frequencies."""
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
    """Share of the change that each pixel takes, `(H, W)` with a mean square of 1: less in smooth areas."""
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
    """The lowest `grid` x `grid` cosine coefficients, scaled as for a picture of `grid` x `grid` pixels."""
    height, width = mean_HW.shape
    rows, columns = _cosines(height, grid), _cosines(width, grid)
    return rows @ mean_HW @ columns.T * grid / (height * width) ** 0.5


@cache
def _cosines(pixels: int, grid: int) -> np.ndarray:
    """The first `grid` orthonormal cosines over a side of `pixels`, `(grid, pixels)` (DCT-II); rows beyond it are 0."""
    n, k = np.arange(pixels), np.arange(grid)[:, None]
    waves = np.cos(np.pi * (n + 0.5) * k / pixels) * (2.0 / pixels) ** 0.5
    waves[0] /= 2.0**0.5
    waves[pixels:] = 0.0
    return waves
