"""Decode back ends: bytes of a video or image to frames. Runs in a child (`child.py`).

Frames are numbered in the order they are shown. A number means the frame that is on the screen in the middle of its
interval at the index's rate, so that a video of constant rate gives frame k for number k, and one of variable rate the
frame that a viewer would see then. A back end that fails hands over to the next one.
"""

from __future__ import annotations

import io
import os
import re
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

IMAGES = ("jpg", "jpeg", "png", "webp")
VIDEOS = ("mp4", "mkv", "webm", "mov", "avi")
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")


class DecodeError(Exception):
    """A sample that can't be used; `cause` is one word for counting, the message says more."""

    def __init__(self, cause: str, detail: str) -> None:
        super().__init__(f"{cause}: {detail}")
        self.cause, self.detail = cause, detail


class Limits(NamedTuple):
    """What a video or image may be at most; checked before anything is decoded."""

    pixels: int = 1 << 25  # of a frame; 8K UHD fits
    frames: int = 1 << 20
    bytes: int = 2 << 30


class Timing(NamedTuple):
    """What a decoder has to know of a video's time line; the index stores it."""

    fps: float = 0.0  # of the numbers that frames are asked by
    vfr: bool = False  # frames come at a variable rate
    careful: bool = False  # hidden frames or open groups of pictures: decord would count wrongly


STEADY = Timing()
LIMITS = Limits()


def read_member(path: str, offset: int, size: int) -> bytes:
    """The bytes of one tar member, or of a whole file where size is -1."""
    with Path(path).open("rb") as file:
        return os.pread(file.fileno(), os.fstat(file.fileno()).st_size if size < 0 else size, offset)


def checked(data: bytes, offset: int, size: int, crc32: int | None) -> bytes:
    """The data, if they are as many as were asked for and those that were indexed; else raises DecodeError."""
    if size >= 0 and len(data) != size:
        raise DecodeError("truncated", f"{len(data)} of {size} bytes at {offset}")
    if crc32 is not None and zlib.crc32(data) != crc32:
        raise DecodeError("checksum", f"the bytes at {offset} are not those that were indexed")
    return data


def decode(
    data: bytes,
    extension: str,
    frames: Sequence[int],
    resize: tuple[int, int],
    timing: Timing = STEADY,
    decoders: Sequence[str] = ("decord", "pyav"),
    limits: Limits = LIMITS,
) -> np.ndarray:
    """The wanted frames, `(T, height, width, 3)` uint8, upright, resized to (height, width).

    Raises DecodeError; where no back end could do it, the message has what each of them said.
    """
    admit(data, extension, limits)
    if extension in IMAGES:
        return open_image(data, limits, resize)[None]
    failures: list[tuple[str, Exception]] = []
    for name in decoders:
        try:
            return BACK_ENDS[name](data, list(frames), resize, timing, limits)
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


def admit(data: bytes, extension: str, limits: Limits) -> None:
    """Raise DecodeError for what must not reach a decoder: nothing, too much, or not one of the known containers."""
    if not data:
        raise DecodeError("empty", "no bytes")
    if len(data) > limits.bytes:
        raise DecodeError("bytes", f"{len(data)} bytes, data.limits.bytes is {limits.bytes}")
    if extension not in IMAGES and container(data) is None:
        raise DecodeError("not_a_video", f"begins with {data[:8]!r}")


def container(data: bytes) -> str | None:
    """FFmpeg's name of the container, by magic bytes. Playlists and scripts, which name other files, are none."""
    if data[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
        return "mov"
    if data[:4] == b"\x1aE\xdf\xa3":
        return "matroska"
    return "avi" if data[:4] == b"RIFF" and data[8:12] == b"AVI " else None


def check_pixels(height: int, width: int, limits: Limits) -> None:
    """Raise DecodeError for frames that are too large to decode."""
    if height * width > limits.pixels:
        raise DecodeError("pixels", f"{width}x{height} pixels, data.limits.pixels is {limits.pixels}")


def open_image(data: bytes, limits: Limits, resize: tuple[int, int] | None = None) -> np.ndarray:
    """An image, `(H, W, 3)` uint8, upright. JPEG, PNG or WebP, whatever its name says."""
    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            check_pixels(image.height, image.width, limits)
            rgb = ImageOps.exif_transpose(image).convert("RGB")
    except Image.DecompressionBombError as error:
        raise DecodeError("pixels", str(error)) from error
    return np.asarray(rgb if resize is None else rgb.resize(resize[::-1], Image.Resampling.BICUBIC))


def shown_at(times: np.ndarray, frames: Sequence[int] | np.ndarray, fps: float) -> list[int]:
    """Which frame is on the screen in the middle of each numbered interval; `times` are seconds, ascending."""
    middle = times[0] + (np.asarray(frames, dtype=np.float64) + 0.5) / fps
    return (np.searchsorted(times, middle, side="right") - 1).tolist()


def _decord(data: bytes, frames: list[int], resize: tuple[int, int], timing: Timing, limits: Limits) -> np.ndarray:
    from decord import VideoReader, cpu

    if timing.careful:
        raise DecodeError("undecodable", "has an edit list or open groups of pictures, which decord doesn't follow")
    height, width = resize
    reader = VideoReader(io.BytesIO(data), ctx=cpu(0), width=width, height=height, num_threads=1)
    if timing.vfr:
        frames = shown_at(reader.get_frame_timestamp(range(len(reader)))[:, 0], frames, timing.fps)
    if frames[-1] >= len(reader):
        raise DecodeError("short", f"frame {frames[-1]} wanted of {len(reader)}")
    try:
        return reader.get_batch(frames).asnumpy()
    except Exception as error:
        if "from_size == to_size" not in str(error):
            raise
    # decord can't batch frames of some small widths (16, 24, 48, 72), whose rows it pads; cut the padding off here
    return np.stack([_unpadded(reader[number].asnumpy(), width) for number in frames])


def _unpadded(frame: np.ndarray, width: int) -> np.ndarray:
    rows = len(frame)
    return frame.reshape(rows, -1)[:, : 3 * width].reshape(rows, width, 3)


def _pyav(data: bytes, frames: list[int], resize: tuple[int, int], timing: Timing, limits: Limits) -> np.ndarray:
    import av
    from av.video.reformatter import Interpolation

    with av.open(io.BytesIO(data), format=container(data), metadata_errors="replace") as file:
        stream = best_stream(file)
        check_pixels(stream.height, stream.width, limits)
        stamps, keys, _ = timeline(file, stream)
        seconds = np.array(stamps, dtype=np.float64) * float(stream.time_base or 1)
        numbers = shown_at(seconds, frames, timing.fps) if timing.vfr else frames
        if numbers[-1] >= len(stamps):
            raise DecodeError("short", f"frame {numbers[-1]} wanted of {len(stamps)}")
        pictures: dict[int, np.ndarray] = {}
        for frame in _walk(file, stream, [stamps[number] for number in dict.fromkeys(numbers)], keys):
            turns = round(frame.rotation / 90) % 4
            height, width = resize[::-1] if turns % 2 else resize
            flat = frame.reformat(width, height, "rgb24", interpolation=Interpolation.BICUBIC)
            pictures[int(frame.pts)] = np.rot90(flat.to_ndarray(), turns)
        return np.stack([pictures[stamps[number]] for number in numbers])


def best_stream(file: Any) -> Any:
    """The video stream that FFmpeg holds for the main one, set to decode in this thread; raises DecodeError."""
    stream = file.streams.best("video")
    if stream is None or stream.disposition & type(stream.disposition).attached_pic:  # a cover is no video
        raise DecodeError("no_video", "there is no video stream in it")
    stream.thread_type, stream.codec_context.thread_count = "NONE", 1
    return stream


def timeline(file: Any, stream: Any) -> tuple[list[int], list[int], bool]:
    """Stamps of all shown and of all key frames, ascending, and whether to be careful; from packets alone.

    Careful: an edit list hides frames, or frames shown before a key frame come after it in the file (an open group of
    pictures), so that counting from a key frame goes wrong.
    """
    stamps, keys, careful = [], [], False
    for packet in file.demux(stream):
        if packet.size:
            stamp = packet.pts if packet.pts is not None else packet.dts
            if stamp is None:
                raise DecodeError("undecodable", "has frames without a time")
            if packet.is_keyframe:
                keys.append(stamp)
            careful = careful or packet.is_discard or bool(keys and stamp < keys[-1])
            if not packet.is_discard:
                stamps.append(stamp)
    if not stamps:
        raise DecodeError("no_video", "there is no frame in it")
    return sorted(stamps), sorted(keys), careful


def _walk(file: Any, stream: Any, wanted: list[int], keys: list[int]) -> Iterator[Any]:
    """Yield the frames with the wanted stamps, ascending; seeks where a key frame lies between two of them."""
    left = set(wanted)
    source: Iterator[Any] = iter(())
    at: int | None = None  # stamp of the last frame that came out
    for stamp in sorted(left):
        key = bisect_right(keys, stamp) - 1
        if at is None or (key >= 0 and keys[key] > at):
            file.seek(stamp, stream=stream, backward=True)
            source = file.decode(stream)
        for frame in source:
            at = frame.pts if frame.pts is not None else frame.dts
            if frame.is_corrupt:
                raise DecodeError("undecodable", f"the frame at {frame.time} s is damaged")
            if at in left:
                left.discard(at)
                yield frame
            if at is not None and at >= stamp:
                break
    if left:
        raise DecodeError("short", f"{len(left)} of {len(wanted)} frames did not come out")


def _torchcodec(data: bytes, frames: list[int], resize: tuple[int, int], timing: Timing, limits: Limits) -> np.ndarray:
    from torchcodec.decoders import VideoDecoder

    if timing.careful:
        raise DecodeError("undecodable", "has an edit list or open groups of pictures, which torchcodec may not follow")
    decoder = VideoDecoder(data, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact")
    check_pixels(decoder.metadata.height or 0, decoder.metadata.width or 0, limits)
    if frames[-1] >= len(decoder):
        raise DecodeError("short", f"frame {frames[-1]} wanted of {len(decoder)}")
    if timing.vfr:
        start = float(decoder.metadata.begin_stream_seconds or 0.0)
        batch = decoder.get_frames_played_at([start + (number + 0.5) / timing.fps for number in frames])
    else:
        batch = decoder.get_frames_at(frames)
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
