"""Decode back ends, and the child process they run in. Imports neither torch nor anything with credentials.

A decoder may spin for ever holding the interpreter's lock, crash or eat all memory; so it runs here, and `pool.py`
kills what doesn't answer. The child reads one JSON request per line from stdin and answers with one JSON line;
pixels go into the shared memory file whose descriptor the parent hands over.
"""

from __future__ import annotations

import io
import json
import mmap
import os
import resource
import signal
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps

IMAGES = ("jpg", "jpeg", "png", "webp")
VIDEOS = ("mp4", "mkv", "webm", "mov", "avi")


class DecodeError(Exception):
    """A sample that can't be used; `cause` is one word for counting, the message says more."""

    def __init__(self, cause: str, detail: str) -> None:
        super().__init__(f"{cause}: {detail}")
        self.cause, self.detail = cause, detail


def read_member(path: str, offset: int, size: int, crc32: int | None) -> bytes:
    """The bytes of one tar member, or of a whole file where size is -1; checked where a checksum is known."""
    with Path(path).open("rb") as file:
        data = os.pread(file.fileno(), os.fstat(file.fileno()).st_size if size < 0 else size, offset)
    if size >= 0 and len(data) != size:
        raise DecodeError("truncated", f"{len(data)} of {size} bytes at {offset}")
    if crc32 is not None and zlib.crc32(data) != crc32:
        raise DecodeError("checksum", f"the bytes at {offset} are not those that were indexed")
    return data


def probe(data: bytes, extension: str) -> dict[str, Any]:
    """Frames (counted), frames a second (0 for an image), width and height; decodes the first frame to be sure."""
    if extension in IMAGES:
        height, width = _image(data).shape[:2]
        return {"frames": 1, "fps": 0.0, "width": width, "height": height}
    reader = _video(data, None)
    height, width = reader[0].shape[:2]
    return {"frames": len(reader), "fps": float(reader.get_avg_fps()), "width": width, "height": height}


def decode(data: bytes, extension: str, frames: list[int], resize: tuple[int, int]) -> np.ndarray:
    """The wanted frames, `(T, height, width, 3)` uint8, resized to (height, width)."""
    if extension in IMAGES:
        return _image(data, resize)[None]
    reader = _video(data, resize)
    if frames[-1] >= len(reader):
        raise DecodeError("short", f"frame {frames[-1]} wanted of {len(reader)}")
    try:
        return reader.get_batch(frames).asnumpy()
    except Exception as error:
        if "from_size == to_size" not in str(error):
            raise
    # decord can't batch frames of some small widths (16, 24, 48, 72), whose rows it pads; cut the padding off here
    return np.stack([_unpadded(reader[number].asnumpy(), resize[1]) for number in frames])


def _unpadded(frame: np.ndarray, width: int) -> np.ndarray:
    rows = len(frame)
    return frame.reshape(rows, -1)[:, : 3 * width].reshape(rows, width, 3)


def _resized(image: Image.Image, resize: tuple[int, int]) -> np.ndarray:
    return np.asarray(image.resize(resize[::-1], Image.Resampling.BICUBIC))


def _image(data: bytes, resize: tuple[int, int] | None = None) -> np.ndarray:
    with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as image:
        rgb = ImageOps.exif_transpose(image).convert("RGB")
    return np.asarray(rgb) if resize is None else _resized(rgb, resize)


def _video(data: bytes, resize: tuple[int, int] | None) -> Any:
    from decord import VideoReader, cpu

    if not _is_container(data):
        raise DecodeError("not_a_video", f"begins with {data[:8]!r}")
    height, width = resize or (-1, -1)
    return VideoReader(io.BytesIO(data), ctx=cpu(0), width=width, height=height, num_threads=1)


def _is_container(data: bytes) -> bool:
    """By magic bytes: ISO media (mp4, mov), Matroska/WebM, AVI. Playlists and scripts are none of these."""
    return data[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free") or data[:4] in (b"\x1aE\xdf\xa3", b"RIFF")


def answer(request: dict[str, Any], memory: Callable[[int], mmap.mmap]) -> dict[str, Any]:
    """Do what one request asks; the pixels of a decode stand in the shared memory afterwards."""
    data = read_member(request["path"], request["offset"], request["size"], request["crc32"])
    if not data:
        raise DecodeError("empty", "no bytes")
    if request["op"] == "probe":
        return {**probe(data, request["extension"]), "crc32": zlib.crc32(data)}
    pixels = decode(data, request["extension"], request["frames"], tuple(request["resize"]))
    top, left, height, width = request["crop"]
    pixels = np.ascontiguousarray(pixels[:, top : top + height, left : left + width])
    if list(pixels.shape[1:3]) != [height, width]:
        raise DecodeError("size", f"decoded {pixels.shape[1:3]}, wanted {(height, width)}")
    memory(pixels.nbytes)[: pixels.nbytes] = pixels.tobytes()
    return {"shape": pixels.shape}


def serve(requests: BinaryIO, answers: BinaryIO, memory_file: int) -> None:
    """Answer requests until the parent closes the pipe."""
    mapped: mmap.mmap | None = None

    def memory(size: int) -> mmap.mmap:
        nonlocal mapped
        if mapped is None or len(mapped) < size:
            mapped = mmap.mmap(memory_file, 0)
        return mapped

    for line in requests:
        try:
            reply = answer(json.loads(line), memory)
        except DecodeError as error:
            reply = {"cause": error.cause, "detail": error.detail}
        except MemoryError:
            reply = {"cause": "memory", "detail": "over the decoder's memory limit"}
        except FileNotFoundError as error:
            reply = {"cause": "missing", "detail": str(error)}
        except Exception as error:  # decoders raise anything; whatever it is, the sample is at fault and is named
            reply = {"cause": "undecodable", "detail": _first_line(error)}
        answers.write(json.dumps(reply).encode() + b"\n")
        answers.flush()


def _first_line(error: Exception) -> str:
    text = f"{type(error).__name__}: {error}".splitlines()[0]
    return text.encode("ascii", "backslashreplace").decode()[:200]


def _main() -> None:
    memory_file, limit = int(sys.argv[1]), int(sys.argv[2])
    _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when a child goes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a decoder prints must not look like an answer
    serve(sys.stdin.buffer, answers, memory_file)


def _die_with_parent() -> None:
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


if __name__ == "__main__":
    _main()
