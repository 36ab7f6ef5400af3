"""What the index says of a video: frames counted from packets, the time line, rotation, codec; one frame is decoded.

Runs in a decode child. Nothing a header claims is taken over where the packets can say it.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image

from sora_train.data.decode import (
    IMAGE_FORMATS,
    IMAGES,
    DecodeError,
    Limits,
    admit,
    best_stream,
    check_pixels,
    container,
    open_image,
    shown_at,
    timeline,
)

_FASTEST = 1000.0  # frames a second; more is a broken time line
_LONGEST = 10 * 24 * 3600.0  # seconds


def probe(data: bytes, extension: str, limits: Limits) -> dict[str, Any]:
    """The index's figures of one video or image; raises DecodeError if it can't be used.

    `fps` is 0 for an image. `width` and `height` are those of the upright picture. `vfr` says that frames don't come
    at a constant rate, `careful` what `timeline` says.
    """
    admit(data, extension, limits)
    if extension in IMAGES:
        height, width = open_image(data, limits).shape[:2]
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            codec, pixel_format = str(image.format).lower(), image.mode
        still = {"frames": 1, "fps": 0.0, "duration": 0.0, "vfr": False, "careful": False, "rotation": 0}
        return {**still, "width": width, "height": height, "codec": codec, "pixel_format": pixel_format}
    return _video(data, limits)


def _video(data: bytes, limits: Limits) -> dict[str, Any]:
    import av

    with av.open(io.BytesIO(data), format=container(data)) as file:
        stream = best_stream(file)
        check_pixels(stream.height, stream.width, limits)
        stamps, _, careful = timeline(file, stream)
        times = np.array(stamps, dtype=np.float64) * float(stream.time_base)
        if len(times) > limits.frames:
            raise DecodeError("frames", f"{len(times)} frames, data.limits.frames is {limits.frames}")
        fps, duration, vfr = rate(times, float(stream.average_rate or 0))
        first = _first(file, stream)
        turns = round(first.rotation / 90) % 4
        height, width = (first.width, first.height) if turns % 2 else (first.height, first.width)
        return {
            "frames": len(times), "fps": fps, "duration": duration, "vfr": vfr, "careful": careful,
            "rotation": turns * 90, "width": width, "height": height,
            "codec": stream.codec_context.name, "pixel_format": first.format.name,
        }  # fmt: skip


def _first(file: Any, stream: Any) -> Any:
    """The first frame that comes out, to be sure that one does."""
    file.seek(0)
    for frame in file.decode(stream):
        return frame
    raise DecodeError("undecodable", "no frame comes out of it")


def rate(times: np.ndarray, claimed: float) -> tuple[float, float, bool]:
    """Frames a second, seconds, and whether the rate varies, from presentation times.

    The claimed rate is believed where every frame is on the screen in the middle of its interval at that rate; else
    the rate is the average. Raises DecodeError for a time line that can't be.
    """
    count = len(times)
    span = float(times[-1] - times[0])
    numbers = np.arange(count)
    if claimed > 0 and shown_at(times, numbers, claimed) == numbers.tolist():
        fps, vfr = claimed, False
    elif count == 1 or span <= 0:
        raise DecodeError("timeline", f"{count} frames within {span} s")
    else:
        last = float(np.median(np.diff(times)))  # how long the last frame stays is not known
        fps = count / (span + last)
        vfr = shown_at(times, numbers, fps) != numbers.tolist()
    if not 0 < fps <= _FASTEST or count / fps > _LONGEST:
        raise DecodeError("timeline", f"{count} frames at {fps:.6g} a second")
    return fps, count / fps, vfr
