"""Reads the frames of a video, a picture or a folder of pictures, to detect a mark in them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from PIL import Image, ImageSequence, UnidentifiedImageError

from sora_train.core.cli import InputError

_MOST_PIXELS = 1 << 26  # of a frame


def read_frames(path: Path) -> Iterator[np.ndarray]:
    """Iterate over the frames of a video, each `(1, H, W, 3)` uint8. Raises InputError if it can't be read."""
    try:
        if path.is_dir():
            for picture in sorted(path.glob("*.png")):
                yield from _pictures(picture)
        elif path.suffix.lower() in (".png", ".jpg", ".jpeg", ".gif", ".webp"):
            yield from _pictures(path)
        else:
            yield from _video(path)
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} can't be read: {error}") from error


def _pictures(path: Path) -> Iterator[np.ndarray]:
    with Image.open(path) as image:
        for frame in ImageSequence.Iterator(image):
            yield np.asarray(frame.convert("RGB"))[None]


def _video(path: Path) -> Iterator[np.ndarray]:
    try:
        with av.open(str(path)) as container:
            container.streams.video[0].thread_type = "NONE"  # a pool of threads costs more than a short video
            size, converter = None, VideoReformatter()  # one for all frames: it takes time to set up
            for frame in container.decode(video=0):
                if frame.width * frame.height > _MOST_PIXELS:
                    raise InputError(f"{path} has frames of {frame.width}x{frame.height}: too large")
                size = size or (frame.width, frame.height)
                if (frame.width, frame.height) == size:  # else skipped: the mark has the first size
                    yield converter.reformat(frame, format="rgb24").to_ndarray()[None]
            if size is None:
                raise InputError(f"{path} holds no frame")
    except (av.error.FFmpegError, IndexError) as error:
        raise InputError(f"{path} can't be read as a video: {error}") from error
