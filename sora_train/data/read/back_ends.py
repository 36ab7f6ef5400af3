"""Decode back ends: bytes of a video or image to frames. Runs in a child (`decode_child.py`).

A back end that fails, or whose decoder reports an error, hands over to the next.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from sora_train.data.read.decode import (
    AS_STORED,
    IMAGES,
    LIMITS,
    STEADY,
    Conversion,
    DecodeError,
    Limits,
    Track,
    admit,
    check_pixels,
    open_image,
    shown_at,
)


class Options(NamedTuple):
    """Settings of decoding that are the same for all requests."""

    decoders: Sequence[str] = ("decord", "pyav")
    limits: Limits = LIMITS
    conversion: Conversion = AS_STORED
    overheard: Callable[[], str] = str  # what decoders wrote to stderr since it was last called


OPTIONS = Options()


def decode(
    data: bytes,
    extension: str,
    frames: Sequence[float],
    resize: tuple[int, int],
    track: Track = STEADY,
    options: Options = OPTIONS,
) -> np.ndarray:
    """Decode the requested frames, `(T, height, width, 3)` uint8, upright, resized to (height, width).

    Raises DecodeError; if no back end could decode them, the message has the reason of each.
    """
    admit(data, extension, options.limits)
    if extension in IMAGES:
        return open_image(data, options.limits, resize)[None]
    plain = not track.careful and not track.converted(options.conversion)
    decoders = [name for name in options.decoders if plain or name == "pyav"]
    if not decoders:
        raise DecodeError("undecodable", "PyAV alone shows it right, and data.decoders leaves it out")
    failures: list[tuple[str, Exception]] = []
    for name in decoders:
        options.overheard()
        try:
            pictures = BACK_ENDS[name](data, list(frames), resize, track, options)
            if said := options.overheard():
                raise DecodeError("damaged", said)
            return pictures
        except DecodeError as error:
            if error.cause == "pixels":
                raise
            failures.append((name, error))
        except MemoryError:
            raise
        except Exception as error:  # decoders raise anything; whatever it is, the next one may do better
            failures.append((name, error))
    causes = {getattr(error, "cause", "undecodable") for _, error in failures}
    detail = "; ".join(f"{name}: {getattr(error, 'detail', None) or first_line(error)}" for name, error in failures)
    raise DecodeError(causes.pop() if len(causes) == 1 else "undecodable", detail)


def _decord(data: bytes, frames: list[float], resize: tuple[int, int], track: Track, options: Options) -> np.ndarray:
    from decord import VideoReader, cpu, logging

    height, width = resize
    logging.set_level(logging.INFO)  # at which FFmpeg says that it made up what was missing
    reader = VideoReader(io.BytesIO(data), ctx=cpu(0), width=width, height=height, num_threads=1)
    if track.frames and len(reader) != track.frames:
        raise DecodeError("undecodable", f"decord finds {len(reader)} frames, the index {track.frames}")
    numbers = [int(number) for number in frames]
    if track.vfr:
        numbers = shown_at(reader.get_frame_timestamp(range(len(reader)))[:, 0], frames, track.fps)
    if numbers[-1] >= len(reader):
        raise DecodeError("short", f"frame {numbers[-1]} wanted of {len(reader)}")
    try:
        return reader.get_batch(numbers).asnumpy()
    except Exception as error:
        if "from_size == to_size" not in str(error):
            raise
    # decord can't batch frames of some small widths (16, 24, 48, 72), whose rows it pads; cut the padding off here
    return np.stack([_unpadded(reader[number].asnumpy(), width) for number in numbers])


def _unpadded(frame: np.ndarray, width: int) -> np.ndarray:
    rows = len(frame)
    return frame.reshape(rows, -1)[:, : 3 * width].reshape(rows, width, 3)


def _pyav(data: bytes, frames: list[float], resize: tuple[int, int], track: Track, options: Options) -> np.ndarray:
    from sora_train.data.read.by_pyav import read

    return read(data, frames, resize, track, options.limits, options.conversion)


def _torchcodec(
    data: bytes, frames: list[float], resize: tuple[int, int], track: Track, options: Options
) -> np.ndarray:
    from torchcodec.decoders import VideoDecoder

    stream = track.stream if track.stream >= 0 else None
    decoder = VideoDecoder(data, stream_index=stream, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact")
    check_pixels(decoder.metadata.height or 0, decoder.metadata.width or 0, options.limits)
    if frames[-1] >= len(decoder):
        raise DecodeError("short", f"frame {frames[-1]} wanted of {len(decoder)}")
    if track.vfr:
        start = float(decoder.metadata.begin_stream_seconds or 0.0)
        batch = decoder.get_frames_played_at([start + (number + 0.5) / track.fps for number in frames])
    else:
        batch = decoder.get_frames_at([int(number) for number in frames])
    pictures, size = batch.data.numpy(), resize[::-1]
    return np.stack([np.asarray(Image.fromarray(p).resize(size, Image.Resampling.BICUBIC)) for p in pictures])


BACK_ENDS: dict[str, Callable[..., np.ndarray]] = {"decord": _decord, "pyav": _pyav, "torchcodec": _torchcodec}
_MODULES = {"decord": "decord", "pyav": "av", "torchcodec": "torchcodec.decoders"}


def load_error(name: str) -> str:
    """Why a back end can't be loaded on this machine; empty if it can."""
    from importlib import import_module

    try:
        import_module(_MODULES[name])
    except Exception as error:  # a library that is missing or broken raises anything
        absent = re.findall(r"(\S+): cannot open shared object file", str(error))
        if absent:  # torchcodec's message is pages long: every version of FFmpeg that it tried
            return f"{name} finds none of {', '.join(dict.fromkeys(absent))}; install FFmpeg's shared libraries"
        return first_line(error)
    return ""


def first_line(error: Exception) -> str:
    """An exception as one short line of ASCII."""
    text = f"{type(error).__name__}: {error}".splitlines()[0]
    return text.encode("ascii", "backslashreplace").decode()[:200]


def by_ffmpeg(error: OSError) -> str:
    """Format an error that FFmpeg returned as one short line of ASCII: its last log message, and its code."""
    log = getattr(error, "log", None)
    said = " ".join(str(log[2]).split()) if log else f"{error.filename or 'it'} failed, without saying why"
    return f"FFmpeg: {said} (code {error.errno})".encode("ascii", "backslashreplace").decode()[:200]
