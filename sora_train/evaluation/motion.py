"""How a made part of a video goes on from what surrounds it: where its object is, and whether it jumps at the seam."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from sora_train.demo_world.judge import only_objects
from sora_train.demo_world.sighting import sight

_LOST = 1.0  # a frame without the object counts as if it were a whole side away
_RESAMPLES = 2000


def path_error(made_THWC: np.ndarray, real_THWC: np.ndarray) -> float:
    """Mean distance between the one object's centres in two videos of one shape, in shorter sides of the frame.

    Over the frames in which the real video shows one object; where the made one doesn't, the distance counts as a whole
    side. NaN if the real video never shows one. Raises ValueError for different shapes.
    """
    if made_THWC.shape != real_THWC.shape:
        raise ValueError(f"need two videos of one shape, got {made_THWC.shape} and {real_THWC.shape}")
    side = min(real_THWC.shape[1:3])
    distances = []
    for made, real in zip(made_THWC, real_THWC, strict=True):
        wanted, got = (only_objects([sight(frame)]) for frame in (real, made))
        if wanted and got:
            distances.append(np.hypot(wanted[0].y - got[0].y, wanted[0].x - got[0].x) / side)
        elif wanted:
            distances.append(_LOST)
    return float(np.mean(distances)) if distances else float("nan")


def changes(frames_THWC: np.ndarray) -> np.ndarray:
    """Mean absolute difference of each frame from the one before it, `(T - 1,)`, in steps of 255."""
    frames = frames_THWC.astype(np.int16)
    return np.abs(np.diff(frames, axis=0)).mean((1, 2, 3))


def seam_jumps(every: np.ndarray, seams: Sequence[int]) -> tuple[float, float]:
    """How the changes into the frames `seams` compare with all others: ratio of the medians, and of the largest.

    `every` is what `changes` gives. 1 is a seam like any other place. NaN where there is no seam, `inf` where
    everything else stands still. Raises ValueError for a seam that has no frame before it.
    """
    if any(not 1 <= seam <= len(every) for seam in seams):
        raise ValueError(f"seams at {list(seams)} of {len(every) + 1} frames")
    at_seam = np.zeros(len(every), dtype=bool)
    at_seam[np.array(seams, dtype=int) - 1] = True
    if not at_seam.any() or at_seam.all():
        return float("nan"), float("nan")
    return tuple(_ratio(f(every[at_seam]), f(every[~at_seam])) for f in (np.median, np.max))  # type: ignore[return-value]


def worst_place(every: np.ndarray, seams: Sequence[int]) -> float:
    """The largest change at any one place of a piece against all other places: the ratio of the medians.

    Places are counted from each seam to the next. A jump that was moved away from the seams shows here. NaN where
    pieces have one place alone.
    """
    pieces = [every[first - 1 : then - 1] for first, then in pairwise(seams)]
    count = min(map(len, pieces), default=0)
    if count < 2:
        return float("nan")
    at = np.array([piece[:count] for piece in pieces])
    place = int(np.median(at, axis=0).argmax())
    return _ratio(np.median(at[:, place]), np.median(np.delete(at, place, axis=1)))


def _ratio(a: float, b: float) -> float:
    return float(a / b) if b > 0 else float("inf")


def median_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Median of independent values and its 95% bootstrap interval (percentiles of 2,000 resamples, seeded).

    B. Efron, "Bootstrap methods: another look at the jackknife", Annals of Statistics 7 (1979). NaN for no values.
    """
    known = np.array([v for v in values if not np.isnan(v)])
    if not len(known):
        return float("nan"), float("nan"), float("nan")
    drawn = np.random.default_rng(0).choice(known, (_RESAMPLES, len(known)))
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5], method="nearest")
    return float(np.median(known)), float(low), float(high)
