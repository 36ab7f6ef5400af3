"""Animated WebP and PNG files as videos, with frames at their own times. Read by Pillow, as FFmpeg can't read WebP.

Runs in a decode child. Pillow composes the changes of each frame; transparent pixels become white, as on a web page.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from sora_train.data.read.decode import DecodeError, Limits, Track, check_pixels, shown_at

EXTENSION = "animated image"  # told to the pool in the place of an extension
_FORMATS = ("WEBP", "PNG")
_SHORTEST_MS, _INSTEAD_MS = 10, 100  # browsers show a frame without a duration for a tenth of a second
_SAME_S = 1e-9  # difference of durations that is none
_ANIMATED = 0x02  # of the flags in a WebP file's VP8X chunk
_OF_PNG = b"acTL"  # the chunk that says how many frames there are, before the first picture


def is_animation(data: bytes) -> bool:
    """Tell whether these bytes begin a WebP or PNG file of several frames."""
    if data.startswith(b"\x89PNG"):
        return _OF_PNG in data.partition(b"IDAT")[0]
    return data[:4] == b"RIFF" and data[8:16] == b"WEBPVP8X" and len(data) > 20 and bool(data[20] & _ANIMATED)


def probe_animation(data: bytes, limits: Limits) -> dict[str, Any]:
    """The figures of `probe`; one frame is an image, with a rate of 0."""
    with _opened(data, limits) as image:
        times, end = _times(image, limits)
        count = len(times)
        return {
            "frames": count, "fps": 0.0 if count == 1 else count / end, "duration": 0.0 if count == 1 else end,
            "vfr": bool(np.ptp(np.diff(times, append=end)) > _SAME_S), "careful": False, "sequential": False,
            "stream": -1, "rotation": 0, "mirrored": False, "interlaced": False, "transfer": "",
            "width": image.width, "height": image.height, "codec": str(image.format).lower(),
            "pixel_format": image.mode,
        }  # fmt: skip


def decode_animation(
    data: bytes, frames: Sequence[float], resize: tuple[int, int], track: Track, limits: Limits
) -> np.ndarray:
    """The wanted frames, `(T, height, width, 3)` uint8, resized to (height, width). Raises DecodeError."""
    with _opened(data, limits) as image:
        times, _ = _times(image, limits)
        numbers = shown_at(times, frames, track.fps) if track.vfr else [int(number) for number in frames]
        if numbers[-1] >= len(times):
            raise DecodeError("short", f"frame {numbers[-1]} wanted of {len(times)}")
        pictures: dict[int, np.ndarray] = {}
        for number in dict.fromkeys(numbers):
            image.seek(number + _before(image))
            over = Image.new("RGBA", image.size, "white")
            flat = Image.alpha_composite(over, image.convert("RGBA")).convert("RGB")
            pictures[number] = np.asarray(flat.resize(resize[::-1], Image.Resampling.BICUBIC))
        return np.stack([pictures[number] for number in numbers])


def _opened(data: bytes, limits: Limits) -> Any:
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except Image.DecompressionBombError as error:
        raise DecodeError("pixels", str(error)) from error
    check_pixels(image.height, image.width, limits)
    return image


def _times(image: Any, limits: Limits) -> tuple[np.ndarray, float]:
    """Seconds at which each frame is first shown, and at which the last one ends."""
    count = int(getattr(image, "n_frames", 1)) - _before(image)
    if count > limits.frames:
        raise DecodeError("frames", f"{count} frames, data.limits.frames is {limits.frames}")
    durations = []
    for number in range(count):
        image.seek(number + _before(image))
        image.load()  # a file tells a frame's duration when it is decoded
        shown = float(image.info.get("duration", 0))
        durations.append(shown if shown > _SHORTEST_MS else _INSTEAD_MS)
    ends = np.cumsum(durations) / 1000
    return np.concatenate(([0.0], ends[:-1])), float(ends[-1])


def _before(image: Any) -> int:
    """Pictures before the first frame: a PNG file may have one for who can't show it moving."""
    return int(bool(getattr(image, "default_image", False)))
