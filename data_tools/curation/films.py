"""Opens films by the container type that their first bytes show, and reads them frame by frame from any position.

Films are too large for memory, so they aren't read like samples (`data/read`). The code that chooses the stream,
converts pictures and detects damage is the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import av
import cv2
import numpy as np
from av.stream import Discard
from av.video.reformatter import ColorRange, Interpolation

from data_tools.curation.stage import Drop
from sora_train.data.read.by_pyav import Complaints
from sora_train.data.read.decode import LIMITS, DecodeError, check_pixels, container
from sora_train.data.read.orientation import upright
from sora_train.data.read.packets import choose_stream

_HEAD = 4096  # first bytes, by which the container is recognised
SHORT_SIDE = 128  # short side of the small pictures that scores are computed from, pixels
_GLANCE_SIDE = 64  # short side of the pictures for cut detection, which are made of every frame, pixels
_TINY = (18, 32)  # height and width of the tiny pictures of every frame
_PLANAR = ("yuv420p", "yuvj420p", "yuv422p", "yuvj422p", "yuv444p", "yuvj444p")  # three planes of bytes
_LEVELS = np.arange(256.0)
_LUMA = np.clip((_LEVELS - 16) * 255 / 219, 0, 255).round().astype(np.uint8)  # from TV range to full range
_CHROMA = np.clip((_LEVELS - 128) * 255 / 224 + 128, 0, 255).round().astype(np.uint8)


class Shown(NamedTuple):
    """A decoded frame, and whether FFmpeg reported damage since the one before."""

    frame: Any
    doubtful: bool


@contextmanager
def opened(path: str, stream: int = -1) -> Iterator[tuple[Any, Any]]:
    """Open a film; yields its container and a video stream. Raises Drop for an unusable file.

    `stream` is the number of the stream; -1: it is chosen.
    """
    with Path(path).open("rb") as file:
        head = file.read(_HEAD)
    if not head:
        raise Drop("empty file")
    kind = container(head)
    if kind is None:
        raise Drop("not a video", f"begins with {head[:8]!r}")
    try:
        with av.open(path, format=kind, metadata_errors="replace") as film:
            chosen = _chosen(film, stream)
            check_pixels(chosen.height, chosen.width, LIMITS)
            for other in film.streams:
                if other.index != chosen.index:
                    other.discard = Discard.all
            yield film, chosen
    except DecodeError as error:
        raise Drop(error.cause.replace("_", " "), error.detail) from error
    except av.error.FFmpegError as error:
        if not Path(path).exists():
            raise FileNotFoundError(path) from error
        raise Drop("undecodable", str(error).splitlines()[0]) from error


def _chosen(film: Any, stream: int) -> Any:
    try:
        return choose_stream(film, stream)
    except AttributeError as error:  # PyAV's answer to a stream whose decoder or size isn't known
        raise Drop("undecodable", "no stream in it that can be decoded") from error


def frames(film: Any, stream: Any, complaints: Complaints) -> Iterator[Shown]:
    """Yield the frames of a film from its current position, in display order; undecodable packets are skipped."""
    codec, doubtful = stream.codec_context, False
    complaints.take()
    for packet in film.demux(stream):
        got: list[Any] = []
        try:
            got = codec.decode(packet)
        except av.error.EOFError:
            return
        except av.error.FFmpegError:
            doubtful = True
        doubtful = bool(complaints.take()) or doubtful
        for frame in got:
            check_pixels(frame.height, frame.width, LIMITS)
            yield Shown(frame, doubtful or bool(frame.is_corrupt))
            doubtful = False


def seconds_of(film: Any, stream: Any) -> float:
    """Length of a film in seconds according to its container; 0 if unknown."""
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    return float(film.duration or 0) / av.time_base


def small_picture(frame: Any, size: tuple[int, int], rotation: int, mirrored: bool) -> np.ndarray:
    """Scale a frame down to an upright RGB picture, `(*size, 3)` uint8: faster than the conversion for training."""
    height, width = size[::-1] if rotation % 180 else size
    if frame.format.name in _PLANAR:
        flat = _from_planes(frame, height, width)
    else:
        flat = frame.reformat(width, height, "rgb24", interpolation=Interpolation.AREA).to_ndarray()
    return np.ascontiguousarray(upright(flat, rotation, mirrored))


def glance(frame: Any, height: int, width: int, rotation: int, mirrored: bool) -> tuple[np.ndarray, np.ndarray]:
    """Make two pictures of a frame: a small one for cut detection, RGB, and a tiny one, gray `(18, 32)`, uint8.

    `height` and `width` are those of the upright film.
    """
    picture = small_picture(frame, small_size(height, width, _GLANCE_SIDE), rotation, mirrored)
    gray = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
    return picture, cv2.resize(gray, _TINY[::-1], interpolation=cv2.INTER_AREA)


def _from_planes(frame: Any, height: int, width: int) -> np.ndarray:
    """Convert a frame to RGB (BT.601) of a size; its planes are scaled down first, so that few pixels are converted."""
    small = [_shrunk(_plane(plane), height, width) for plane in frame.planes]
    if frame.color_range != ColorRange.JPEG and not frame.format.name.startswith("yuvj"):
        small = [cv2.LUT(plane, table) for plane, table in zip(small, (_LUMA, _CHROMA, _CHROMA), strict=True)]
    luma, blue, red = small
    return cv2.cvtColor(cv2.merge((luma, red, blue)), cv2.COLOR_YCrCb2RGB)


def _shrunk(plane_HW: np.ndarray, height: int, width: int) -> np.ndarray:
    """Scale a plane down: halve it as often as possible, which is fast, then resize by the remaining factor below 2."""
    while plane_HW.shape[0] >= 2 * height and plane_HW.shape[1] >= 2 * width:
        rows, columns = (side // 2 for side in plane_HW.shape)
        halved = plane_HW[: 2 * rows, : 2 * columns]
        plane_HW = cv2.resize(halved, (columns, rows), interpolation=cv2.INTER_AREA)
    return cv2.resize(plane_HW, (width, height), interpolation=cv2.INTER_LINEAR)


def luma_of(frame: Any) -> np.ndarray:
    """The brightness of a frame, in the range of levels it is stored in, `(H, W)` uint8."""
    if frame.format.name in _PLANAR:
        return _plane(frame.planes[0])
    return np.asarray(frame.reformat(format="gray").to_ndarray())


def _plane(plane: Any) -> np.ndarray:
    return np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)[:, : plane.width]


def small_size(height: int, width: int, side: int = SHORT_SIDE) -> tuple[int, int]:
    """Height and width with a short side of `side` pixels, the other in proportion; nothing is enlarged."""
    scale = min(1.0, side / min(height, width))
    return max(2, round(height * scale)), max(2, round(width * scale))
