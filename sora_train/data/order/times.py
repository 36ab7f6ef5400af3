"""Choice of the frames of a clip: the source frames shown at n / fps seconds, rather than every k-th frame.

A clip begins in the middle of the time that its first frame is shown. Frame n of the clip is the source frame shown n /
fps seconds later, so it is never more than half a source frame from wall time; if the source is slower than the clip,
frames repeat. Rates are rounded to thousandths of a frame a second, and everything after that is integer arithmetic:
every machine takes the same frames.
"""

from __future__ import annotations

import numpy as np

from sora_train.core.batch import Visit


def thousandths(fps: np.ndarray | float) -> np.ndarray:
    """Frames in a thousand seconds, at least 1 (an image, whose rate is 0, needs none)."""
    return np.maximum(1, np.rint(np.asarray(fps, dtype=np.float64) * 1000)).astype(np.int64)


def distance(n: np.ndarray | int, source: np.ndarray | int, clip: np.ndarray | int) -> np.ndarray:
    """Source frames from the first frame of a clip to its frame `n`; rates in `thousandths`."""
    return np.asarray((2 * np.asarray(n) * source + clip) // (2 * np.asarray(clip)))


def available(frames: np.ndarray, source: np.ndarray, clip: np.ndarray) -> np.ndarray:
    """Frames of the longest clip from sources of `frames` frames; 1 for an image, whatever its rate.

    `source` and `clip` are the frame rates in `thousandths`.
    """
    whole = (clip * (2 * frames - 1) + 2 * source - 1) // (2 * source)
    return np.asarray(np.where(frames == 1, 1, whole))


def source_frames(visit: Visit, fps: float, vfr: bool = False) -> list[int] | list[float]:
    """Numbers of a visit's frames in a source of `fps` frames a second.

    Where the source's rate varies (`vfr`) `fps` is its average and the numbers have fractions: times in units of
    1 / fps, from the middle of frame 0 on.
    """
    if visit.fps == 0 or visit.frames == 1:
        return [visit.first] * visit.frames
    source, clip = int(thousandths(fps)), int(thousandths(visit.fps))
    if vfr and source != clip:
        return [visit.first + n * source / clip for n in range(visit.frames)]
    return (visit.first + distance(np.arange(visit.frames), source, clip)).tolist()
