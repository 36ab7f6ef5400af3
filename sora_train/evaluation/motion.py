"""Measures of motion: its amount, its smoothness, steadiness of brightness, and jumps at seams."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from PIL import Image

from sora_train.evaluation.metric import Sample, metric
from sora_train.evaluation.pixels import edges, luma
from sora_train.evaluation.remembered import remembered

_STATIC = 0.002  # shorter sides a second: slower videos count as static
_SMALL = 32  # pixels a side of the frames that are compared for consistency
_NONE = float("nan")


@metric("flicker", groups=("quick", "full"), better="down")
def flicker(made_THWC: np.ndarray, real_THWC: np.ndarray | None, sample: Sample) -> dict[str, float]:
    """Mean absolute second difference of brightness in time, on a scale of 0 to 255; steady motion adds little."""
    if len(made_THWC) < 3:
        return {"flicker": _NONE}
    return {"flicker": _mean_changes(made_THWC)[1]}


@metric("jerk", groups=("quick", "full"), better="down")
def jerk(made_THWC: np.ndarray, real_THWC: np.ndarray | None, sample: Sample) -> dict[str, float]:
    """Ratio of mean second to mean first differences in time: 0 for steady motion, 2 for oscillation.

    0 for a static video.
    """
    if len(made_THWC) < 3:
        return {"jerk": _NONE}
    amount, second = _mean_changes(made_THWC)
    return {"jerk": second / amount if amount else 0.0}


@metric("motion", groups=("quick", "full"), better=None, needs=["fps"])
def motion(made_THWC: np.ndarray, real_THWC: np.ndarray | None, sample: Sample) -> dict[str, float]:
    """Speed of edges in the picture, in shorter sides of the frame per second."""
    return {"motion": speed(made_THWC, sample.fps) if len(made_THWC) > 1 else _NONE}


@metric("dynamic", groups=("quick", "full"), better=None, needs=["fps"], summary="rate")
def dynamic(made_THWC: np.ndarray, real_THWC: np.ndarray | None, sample: Sample) -> dict[str, float]:
    """1.0 for a video in which anything moves at all, else 0.0."""
    moves = speed(made_THWC, sample.fps) >= _STATIC if len(made_THWC) > 1 else _NONE
    return {"dynamic": float(moves)}


def speed(frames_THWC: np.ndarray, fps: float) -> float:
    """Normal flow, in shorter sides of the frame per second: total change in time divided by total change in space.

    From the constraint of B. Horn and B. Schunck, "Determining optical flow", Artificial Intelligence 17 (1981): for a
    single edge it is the edge's speed along its normal, independent of its contrast. 0 for frames without edges.
    """
    length = edges(frames_THWC)
    return _mean_changes(frames_THWC)[0] / length / min(frames_THWC.shape[1:3]) * fps if length else 0.0


@remembered
def _mean_changes(frames_THWC: np.ndarray) -> tuple[float, float]:
    """Mean absolute first and second differences of brightness in time, on a scale of 0 to 255."""
    grey_THW, before = luma(frames_THWC), None
    first, second = 0.0, 0.0
    for one, other in pairwise(grey_THW):  # pair by pair, which stays in the cache
        change = other - one
        first += float(np.abs(change).mean(dtype=np.float64))
        second += 0.0 if before is None else float(np.abs(change - before).mean(dtype=np.float64))
        before = change
    return first / max(1, len(grey_THW) - 1), second / max(1, len(grey_THW) - 2)


@metric("consistency", groups=("quick", "full"), better="up")
def consistency(made_THWC: np.ndarray, real_THWC: np.ndarray | None, sample: Sample) -> dict[str, float]:
    """Mean cosine similarity of each reduced frame, minus its mean, with the first and with the previous frame."""
    if len(made_THWC) < 2:
        return {"consistency": _NONE}
    small = [np.asarray(Image.fromarray(f).resize((_SMALL, _SMALL), Image.Resampling.BOX)) for f in made_THWC]
    flat_TD = np.stack(small).reshape(len(small), -1).astype(np.float64)
    return {"consistency": likeness(flat_TD - flat_TD.mean(axis=1, keepdims=True))}


def likeness(features_TD: np.ndarray) -> float:
    """Mean cosine of each row with the first and with the previous row: VBench's definition of subject consistency.

    Z. Huang et al., "VBench: comprehensive benchmark suite for video generative models", CVPR 2024, section 3.2.
    """
    unit_TD = features_TD / np.maximum(np.linalg.norm(features_TD, axis=1, keepdims=True), 1e-12)
    before, first = (unit_TD[1:] * unit_TD[:-1]).sum(1), unit_TD[1:] @ unit_TD[0]
    return float((before + first).mean() / 2)


def changes(frames_THWC: np.ndarray) -> np.ndarray:
    """Mean absolute difference of each frame from the previous one, `(T - 1,)`, on a scale of 0 to 255."""
    frames = frames_THWC.astype(np.int16)
    return np.abs(np.diff(frames, axis=0)).mean((1, 2, 3))


def seam_jumps(every: np.ndarray, seams: Sequence[int]) -> tuple[float, float]:
    """Compare the changes between frames at seams with those everywhere else.

    Args:
        every: Mean absolute change into each frame but the first, `(T - 1,)`, as `changes` returns it.
        seams: Numbers of the first frames after a seam, 1 to T - 1.

    Returns:
        Ratio of the medians, and ratio of the maxima; 1 for no difference. NaN if there are only seams or none, `inf`
        if the other changes are 0.

    Raises:
        ValueError: A seam is out of range.
    """
    if any(not 1 <= seam <= len(every) for seam in seams):
        raise ValueError(f"seams at {list(seams)} of {len(every) + 1} frames")
    at_seam = np.zeros(len(every), dtype=bool)
    at_seam[np.array(seams, dtype=int) - 1] = True
    if not at_seam.any() or at_seam.all():
        return float("nan"), float("nan")
    return tuple(_ratio(f(every[at_seam]), f(every[~at_seam])) for f in (np.median, np.max))  # type: ignore[return-value]


def worst_place(every: np.ndarray, seams: Sequence[int]) -> float:
    """Compare the position within a piece that has the largest change with all other positions: ratio of the medians.

    Positions are counted from one seam to the next, so this finds jumps that don't lie at the seams. `every` and
    `seams` are those of `seam_jumps`. NaN with fewer than two seams, or if a piece has fewer than two positions.
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
