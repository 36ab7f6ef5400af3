"""Images and videos that a user gives to sample from, decoded as in training: upright, at their times, by data.fit.

Decoding happens in the pool's child process, within the limits of `data.limits`. A video is read piece by piece at the
requested size, so this process's memory use doesn't depend on the video's length and resolution.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from sora_train.config.schema import Fit
from sora_train.core.batch import Visit
from sora_train.core.cli import InputError
from sora_train.data.order.times import available, source_frames, thousandths
from sora_train.data.read.animation import EXTENSION, is_animation
from sora_train.data.read.decode import DecodeError, Track, container
from sora_train.data.read.pool import Pool

_HEAD = 1 << 10  # bytes that tell the kind of a file
_AT_ONCE = 32  # frames of a piece
_GLIMPSE = 8  # frames that are checked


class Given:
    """An image (of one frame) or a video, resampled to `fps` frames a second, the clip's rate.

    `height` and `width` are those of the upright picture, `frames` is the number of frames after resampling.
    """

    def __init__(self, path: str, fps: float, fit: Fit, pool: Pool) -> None:
        """Probe the file. Raises InputError with the reason if it can't be used."""
        self.path, self.pool, self.fit, self.fps = path, pool, fit, fps
        self._file = str(Path(path).absolute())
        self.kind = _kind(path)
        try:
            self.figures = pool.probe(self._file, self.kind).result()
        except DecodeError as error:
            raise InputError(f"{path} can't be used: {error}") from error
        self.height, self.width = int(self.figures["height"]), int(self.figures["width"])
        self.track = Track.of(self.figures)
        count = available(np.asarray(self.track.frames), thousandths(self.track.fps), thousandths(fps))
        self.frames = int(count) if self.track.fps else 1

    def decoded(self, first: int, count: int, size: tuple[int, int]) -> np.ndarray:
        """Decode `count` frames from frame `first` on, at `size` (height, width); returns `(T, H, W, 3)` uint8.

        Raises InputError if they can't be decoded.
        """
        resize, crop = fitted((self.height, self.width), size, self.fit)
        if resize[0] * resize[1] > self.pool.limits.pixels:
            raise InputError(f"{self.path} is {self.width}x{self.height}: too long and thin for {size[1]}x{size[0]}")
        wanted = self._numbers(first, count)
        try:
            return self.pool.decode(
                self._file, self.kind, (0, -1, None), wanted, resize, crop, track=self.track
            ).result()
        except DecodeError as error:
            raise InputError(f"{self.path} can't be used: {error}") from error

    def glimpse(self, size: tuple[int, int]) -> np.ndarray:
        """Decode a few evenly spaced frames `(T, H, W, 3)` uint8, for the safeguards."""
        places = sorted({round(place) for place in np.linspace(0, self.frames - 1, _GLIMPSE)})
        return np.concatenate([self.decoded(place, 1, size) for place in places])

    def pieces(self, first: int, last: int, size: tuple[int, int]) -> Iterator[np.ndarray]:
        """Iterate over frames `first` to `last` (exclusive) in arrays `(T, H, W, 3)` uint8 of a few frames."""
        for start in range(first, last, _AT_ONCE):
            yield self.decoded(start, min(_AT_ONCE, last - start), size)

    def _numbers(self, first: int, count: int) -> Sequence[float]:
        """Numbers of the file's frames that are on the screen at the times of the clip's frames, as in training."""
        fps = self.fps if self.track.fps else 0.0
        visit = Visit(0, 0, first + count, fps, (self.height, self.width), (0, 0, self.height, self.width), "", 0)
        return source_frames(visit, self.track.fps, self.track.vfr)[first:]

    def sha256(self) -> str:
        """SHA-256 of the file as hex digits, to detect later whether it has changed."""
        with Path(self.path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def fitted(
    source: tuple[int, int], target: tuple[int, int], fit: Fit
) -> tuple[tuple[int, int], tuple[int, int, int, int]]:
    """Resize and centre crop that bring a picture to a target size.

    Args:
        source: Height and width of the picture.
        target: Height and width of the result.
        fit: Whether to crop or to stretch.

    Returns:
        The size to resize to (height, width), and the crop (top, left, height, width).
    """
    (height, width), (out_height, out_width) = source, target
    if fit is Fit.stretch:
        return target, (0, 0, *target)
    cover = max(out_height / height, out_width / width)
    resize = (max(out_height, round(height * cover)), max(out_width, round(width * cover)))
    return resize, ((resize[0] - out_height) // 2, (resize[1] - out_width) // 2, *target)


def _kind(path: str) -> str:
    """Determine the extension to pass to the decoder from the file's first bytes: names of files are often wrong.

    Raises InputError if the file can't be read.
    """
    if not Path(path).is_file():
        raise InputError(f"there is no file {path}")
    try:
        with Path(path).open("rb") as file:
            head = file.read(_HEAD)
    except OSError as error:
        raise InputError(f"{path} can't be read: {error.strerror}") from error
    if is_animation(head):
        return EXTENSION
    return "png" if container(head) is None else "mp4"
