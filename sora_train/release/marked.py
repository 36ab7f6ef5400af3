"""Embeds a mark at the least strength that survives re-encoding, as tried on the first frames of the video."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from sora_train.generation.video import Video, pieces_of
from sora_train.release.mark import PRESENT
from sora_train.release.marks import Mark

_CRF, _FRAMES = 28, 24  # of the re-encoding that a mark is tested with: quality, and number of frames


def attempts(mark: Mark, video: Video, id: str) -> Iterator[Video]:
    """Yield the marked video at the least strength that survives re-encoding, then at each larger strength.

    A video in pieces can be read only once, so it is yielded once, at the strength that its first piece needs.
    """
    pieces = pieces_of(video)
    first = next(pieces)
    place, marked = _least(mark, first, id)
    if not isinstance(video, np.ndarray):
        yield chain([marked], mark.embedded(pieces, id, mark.strengths[place]))
        return
    yield marked
    for strength in mark.strengths[place + 1 :]:
        yield _embedded(mark, first, id, strength)


def _least(mark: Mark, frames_THWC: np.ndarray, id: str) -> tuple[int, np.ndarray]:
    """Index of the least strength that survives re-encoding (the last if none does), and the frames marked with it."""
    low, high, made = 0, len(mark.strengths) - 1, {}
    while low < high:
        middle = (low + high) // 2
        made[middle] = _embedded(mark, frames_THWC, id, mark.strengths[middle])
        found = mark.found([encoded_anew(made[middle][:_FRAMES], _CRF)])
        if not found.is_that(id):
            low = middle + 1
            continue
        high = middle
        weaker = [found.strength * strength / mark.strengths[middle] for strength in mark.strengths[low:middle]]
        low += sum(strength < PRESENT for strength in weaker)  # detected strength is proportional to embedded
    return low, made[low] if low in made else _embedded(mark, frames_THWC, id, mark.strengths[low])


def _embedded(mark: Mark, frames_THWC: np.ndarray, id: str, strength: float) -> np.ndarray:
    return np.concatenate(list(mark.embedded([frames_THWC], id, strength)))


def encoded_anew(frames_THWC: np.ndarray, crf: int) -> np.ndarray:
    """Brightness of frames after H.264 encoding at `crf` and decoding, `(T, H, W, 3)` uint8.

    All three channels are equal. Odd sizes lose their last row or column.
    """
    height, width = (side // 2 * 2 for side in frames_THWC.shape[1:3])
    encoder: Any = av.CodecContext.create("libx264", "w")
    encoder.width, encoder.height, encoder.pix_fmt, encoder.framerate = width, height, "gray", 8
    encoder.thread_count, encoder.options = 1, {"crf": str(crf), "preset": "veryfast"}
    decoder: Any = av.CodecContext.create("h264", "r")
    decoder.thread_type, decoder.thread_count = "NONE", 1
    converter, packets = VideoReformatter(), []
    for number, picture in enumerate(frames_THWC[:, :height, :width]):
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
        frame = converter.reformat(frame, format="gray")
        frame.pts = number
        packets += encoder.encode(frame)
    packets += encoder.encode(None)
    shown_THW = np.stack([frame.to_ndarray() for packet in [*packets, None] for frame in decoder.decode(packet)])
    return np.broadcast_to(shown_THW[..., None], (*shown_THW.shape, 3))
