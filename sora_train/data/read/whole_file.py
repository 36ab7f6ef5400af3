"""A whole image or video file, with the code and at the times that training reads: for prompts and for measures."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sora_train.core.batch import Visit
from sora_train.core.cli import InputError
from sora_train.data.order.times import available, source_frames, thousandths
from sora_train.data.read.decode import DecodeError, Track, container
from sora_train.data.read.pool import Pool

_HEAD = 1024  # bytes by which a video is told from an image


def read_file(path: str | Path, fps: float, pool: Pool | None = None) -> tuple[np.ndarray, float]:
    """All frames `(T, H, W, 3)` uint8 of an image or video as shown at each n / fps, and their rate (0: an image).

    With `fps` 0 a video keeps its own rate. Raises InputError for a file that can't be read.
    """
    if pool is None:
        with Pool(1) as own:
            return read_file(path, fps, own)
    if not Path(path).is_file():
        raise InputError(f"there is no file {path}")
    with Path(path).open("rb") as file:
        extension = "png" if container(file.read(_HEAD)) is None else "mp4"  # no more than: image, or video
    try:
        said = pool.probe(str(path), extension).result()
        track, size = Track.of(said), (said["height"], said["width"])
        rate = (fps or track.fps) if track.fps else 0.0
        count = int(available(np.asarray(track.frames), thousandths(track.fps), thousandths(rate)))
        visit = Visit(0, 0, count, rate, size, (0, 0, *size), "", 0)
        wanted = source_frames(visit, track.fps, track.vfr)
        return pool.decode(str(path), extension, (0, -1, None), wanted, size, visit.crop, track).result(), rate
    except DecodeError as error:
        raise InputError(f"{path}: {error}") from error
