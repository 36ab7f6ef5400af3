"""Stage `look`: the single decode of a film, from which cuts, borders, scores and duplicates are computed.

Its results are stored in `work/look/SHA256.npz`: small pictures twice a second, tiny ones of every frame, the time of
every frame, and the cuts that a detector found. Later stages can then run with other parameters without decoding.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from data_tools.curation.films import frames, glance, luma_of, opened, small_picture, small_size
from data_tools.curation.forbidden import read_forbidden
from data_tools.curation.hashes import hashes_of
from data_tools.curation.motion import motion
from data_tools.curation.stage import Drop, Item, Stage
from sora_train.data.read.by_pyav import Complaints
from sora_train.data.read.decode import DecodeError
from sora_train.data.read.probe import rate

RATE = 2.0  # small pictures a second
_THUMBNAIL = 96  # pixels of the short side
_REORDERED = 16  # most frames that a decoder still buffers when it reports damage
_SHARP_SIDE = 256  # short side that sharpness is measured at, so that it doesn't depend on a film's size
_FPS = 24.0  # assumed frame rate of a film that doesn't tell
_PARTNER_S = 1 / 12  # seconds between the two pictures that motion is measured from
_READS = (
    "path", "sha256", "stream", "height", "width", "duration", "claimed", "rotation", "mirrored",
)  # fmt: skip
_MODULES = tuple(f"data_tools.curation.{name}" for name in ("look", "films", "hashes", "motion", "forbidden"))


def stage(cut_threshold: float, forbidden: Mapping[str, str]) -> Stage:
    """Build the stage. `cut_threshold` is that of the cut detector; `forbidden` is from `list_parameters`."""
    parameters = {"threshold": cut_threshold, "forbidden": dict(forbidden)}
    return Stage("look", look, _READS, _MODULES, parameters, files=("look",))


@dataclass
class Seen:
    """Measurements of a film's frames. Lists over all frames have T entries, those over small pictures S."""

    stamps: list[int | None] = field(default_factory=list)  # T, in the stream's time base
    doubtful: list[bool] = field(default_factory=list)  # T: damage was reported at it
    keys: list[bool] = field(default_factory=list)  # T: it is a key frame
    tiny: list[np.ndarray] = field(default_factory=list)  # T, (18, 32) uint8
    at: list[int] = field(default_factory=list)  # S: the frame of a small picture
    small: list[np.ndarray] = field(default_factory=list)  # S, gray, short side 128
    thumbnails: list[bytes] = field(default_factory=list)  # S, JPEG
    figures: list[tuple[float, float, float]] = field(default_factory=list)  # S: motion, sharpness, noise

    def seconds(self, first: int, second: int, base: float, fps: float) -> float:
        """Seconds between two frames: from their stamps (times `base`), or from `fps` if the stamps aren't usable."""
        one, other = self.stamps[first], self.stamps[second]
        return (other - one) * base if one is not None and other is not None and other > one else (second - first) / fps


def look(item: Item, parameters: Mapping[str, Any], folder: Path) -> Item:
    """Decode a film once, and store its measurements. Raises Drop for a forbidden or undecodable film."""
    cv2.setNumThreads(1)
    listed = parameters["forbidden"]
    forbidden = read_forbidden(**listed) if listed else None
    detector = _Detector(parameters["threshold"], item["claimed"] or _FPS)
    seen = Seen()
    partner: tuple[int, np.ndarray] | None = None
    fps = item["claimed"] or _FPS
    upright = item["height"], item["width"], item["rotation"], item["mirrored"]
    step, apart = max(1.0, fps / RATE), max(1, round(fps * _PARTNER_S))
    with Complaints() as complaints, opened(item["path"], item["stream"]) as (film, stream):
        base = float(stream.time_base or 1)
        for number, shown in enumerate(frames(film, stream, complaints)):
            picture, tiny = glance(shown.frame, *upright)
            seen.stamps.append(shown.frame.pts)
            seen.doubtful.append(shown.doubtful)
            seen.keys.append(bool(shown.frame.key_frame))
            seen.tiny.append(tiny)
            detector.take(number, picture)
            if partner is not None and number == partner[0]:
                _, gray = _small(item, shown.frame)
                seen.figures[-1] = (
                    motion(partner[1], gray, seen.seconds(number - apart, number, base, fps)),
                    *seen.figures[-1][1:],
                )
                partner = None
            if number >= len(seen.at) * step:
                picture, gray = _small(item, shown.frame)
                if forbidden is not None and forbidden.has_picture(hashes_of(gray)):
                    raise Drop("forbidden", f"on the list {Path(listed['path']).name}")
                _take_picture(seen, number, picture, gray, shown.frame)
                partner = (number + apart, gray)
    return _kept(item, seen, detector.cuts(), base, folder)


def _small(item: Item, frame: Any) -> tuple[np.ndarray, np.ndarray]:
    """A frame upright and small, in RGB and in gray."""
    picture = small_picture(frame, small_size(item["height"], item["width"]), item["rotation"], item["mirrored"])
    return picture, cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)


def _take_picture(seen: Seen, number: int, picture: np.ndarray, gray: np.ndarray, frame: Any) -> None:
    seen.at.append(number)
    seen.small.append(gray)
    height, width = small_size(gray.shape[0], gray.shape[1], _THUMBNAIL)
    buffer = io.BytesIO()
    Image.fromarray(picture).resize((width, height), Image.Resampling.BILINEAR).save(buffer, "JPEG", quality=80)
    seen.thumbnails.append(buffer.getvalue())
    height, width = small_size(frame.height, frame.width, _SHARP_SIDE)
    medium = frame.reformat(width, height, "gray").to_ndarray()
    seen.figures.append((np.nan, float(cv2.Laplacian(medium, cv2.CV_32F).var()), noise_of(frame)))


def noise_of(frame: Any) -> float:
    """Standard deviation of the noise in a frame's middle, in levels of 255, after Immerkaer (1996)."""
    full = luma_of(frame)
    height, width = full.shape
    middle = full[height // 4 : height - height // 4, width // 4 : width - width // 4].astype(np.float32)
    mask = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], np.float32)
    inner = np.abs(cv2.filter2D(middle, -1, mask)[1:-1, 1:-1])
    # the median instead of Immerkaer's mean, so that edges don't count as noise
    return float(np.median(inner) / 0.6745 / 6.0) if inner.size else 0.0


def _kept(item: Item, seen: Seen, cuts: list[int], base: float, folder: Path) -> Item:
    """Write the measurements to a file, and return its name and the figures of the film's time line."""
    count = len(seen.stamps)
    if count < 2:
        raise Drop("undecodable", f"{count} frames come out of it")
    known = [stamp for stamp in seen.stamps if stamp is not None]
    timed = len(known) == count and all(one < other for one, other in zip(known, known[1:], strict=False))
    times = np.array(known if timed else range(count)) * (base if timed else 1 / (item["claimed"] or _FPS))
    try:
        fps, duration, vfr = rate(times, item["claimed"])
    except DecodeError as error:
        raise Drop(error.cause, error.detail) from error
    name = f"{item['sha256'][:32]}.npz"
    temporary = folder / f".{name}.{os.getpid()}.npz"
    try:
        np.savez_compressed(
            temporary,
            stamps=np.array(known if timed else range(count), np.int64), times=times - times[0],
            damaged=_spread(np.array(seen.doubtful), np.array(seen.keys)), tiny=np.stack(seen.tiny),
            cuts=np.array(cuts, np.int64), at=np.array(seen.at, np.int64), small=np.stack(seen.small),
            thumbnails=np.frombuffer(b"".join(seen.thumbnails), np.uint8),
            thumbnail_ends=np.cumsum([len(one) for one in seen.thumbnails]),
            figures=np.array(seen.figures, np.float64),
        )  # fmt: skip
        temporary.replace(folder / name)
    finally:
        temporary.unlink(missing_ok=True)
    return {"look": name, "frames": count, "fps": fps, "seconds": duration, "vfr": vfr, "timed": timed}


def _spread(doubtful: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Frames that may be damaged: from a little before each report up to the next key frame."""
    damaged = np.zeros(len(doubtful), bool)
    places = np.flatnonzero(keys)
    for number in np.flatnonzero(doubtful):
        following = places[places > number]
        damaged[max(0, number - _REORDERED) : following[0] if len(following) else len(damaged)] = True
    return damaged


class _Detector:
    """Detects cuts with PySceneDetect's adaptive detector; shots can be as short as a quarter of a second."""

    def __init__(self, threshold: float, fps: float) -> None:
        from scenedetect import FrameTimecode
        from scenedetect.detectors import AdaptiveDetector

        self._timecode, self._fps = FrameTimecode, fps
        self._detector = AdaptiveDetector(adaptive_threshold=threshold, min_scene_len=max(2, round(fps / 4)))
        self._found: list[Any] = []
        self._last = 0

    def take(self, number: int, picture_HWC: np.ndarray) -> None:
        """Process the next frame."""
        self._last = number
        turned = cv2.cvtColor(picture_HWC, cv2.COLOR_RGB2BGR)
        self._found += self._detector.process_frame(self._timecode(number, self._fps), turned)

    def cuts(self) -> list[int]:
        """The number of the first frame of each shot except the first one."""
        self._found += self._detector.post_process(self._timecode(self._last, self._fps))
        return sorted({cut.frame_num for cut in self._found} - {0})
