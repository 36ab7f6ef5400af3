"""What all decoders share: limits, the facts of a video track, containers, images.

Frames are numbered in display order. A number denotes the frame that is shown in the middle of its interval at the
index's rate: for a video of constant rate, number k is frame k; for one of variable rate, it is the frame that a viewer
would see at that time.
"""

from __future__ import annotations

import io
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from sora_train.data.read.colour_profile import in_srgb

IMAGES = ("jpg", "jpeg", "jfif", "png", "webp", "bmp", "tif", "tiff", "avif")
VIDEOS = (
    "mp4", "mkv", "webm", "mov", "avi", "m4v", "3gp", "ts", "mts", "m2ts", "gif", "flv", "mpg", "mpeg", "wmv", "ogv",
)  # fmt: skip
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "AVIF")
_MAGIC = {  # FFmpeg's name of a container by its first bytes
    b"\x1aE\xdf\xa3": "matroska", b"GIF87a": "gif", b"GIF89a": "gif", b"FLV\1": "flv", b"\0\0\1\xba": "mpeg",
    b"0&\xb2u\x8ef\xcf\x11": "asf", b"OggS": "ogg",
}  # fmt: skip
_SYNC, _SYNCS = 0x47, 5  # first byte of each packet of a transport stream, and how many of them are looked at
_WHITE = 255  # what shows through where a picture has no colour, as on the page of a browser


class DecodeError(Exception):
    """A sample that can't be used. `cause` is one word for counting; the message has details."""

    def __init__(self, cause: str, detail: str) -> None:
        super().__init__(f"{cause}: {detail}")
        self.cause, self.detail = cause, detail


class Limits(NamedTuple):
    """Limits of a video or image; checked before anything is decoded."""

    pixels: int = 1 << 25  # of a frame; 8K UHD fits
    frames: int = 1 << 20
    bytes: int = 2 << 30


class Track(NamedTuple):
    """Facts of a video's pictures that a decoder needs; the index stores it, and chose the stream."""

    fps: float = 0.0  # of the numbers that frames are asked by
    vfr: bool = False  # frames come at a variable rate
    careful: bool = False  # decord and torchcodec would count wrongly, or show it wrongly
    sequential: bool = False  # frames can't be asked for alone: decoded from the start and counted
    stream: int = -1  # number of the stream in the file; -1: to be chosen
    frames: int = 0  # that are shown; 0: not known
    rotation: int = 0  # degrees counter-clockwise to stand upright
    mirrored: bool = False  # left to right, before that
    interlaced: bool = False
    transfer: str = ""  # of HDR: pq or hlg; empty: SDR

    @classmethod
    def of(cls, figures: Mapping[str, Any]) -> Track:
        """The track that the index's figures (or columns, of one row) describe."""
        kinds = {name: type(value) for name, value in cls._field_defaults.items()}
        return cls(**{name: kind(figures[name]) for name, kind in kinds.items()})

    def converted(self, conversion: Conversion) -> bool:
        """Tell whether pictures are changed on the way, which PyAV alone does."""
        return (conversion.deinterlace and self.interlaced) or (conversion.tone_map and bool(self.transfer))


class Conversion(NamedTuple):
    """Changes to pictures that aren't meant for a screen of today; as they are stored by default."""

    deinterlace: bool = False
    tone_map: bool = False


STEADY = Track()
LIMITS = Limits()
AS_STORED = Conversion()


def read_member(path: str, offset: int, size: int) -> bytes:
    """Read the bytes of one tar member, or of a whole file if size is -1."""
    with Path(path).open("rb") as file:
        return os.pread(file.fileno(), os.fstat(file.fileno()).st_size if size < 0 else size, offset)


def checked(data: bytes, offset: int, size: int, crc32: int | None) -> bytes:
    """Return `data` if its size and checksum are the given ones; else raise DecodeError. None: not compared."""
    if size >= 0 and len(data) != size:
        raise DecodeError("truncated", f"{len(data)} of {size} bytes at {offset}")
    if crc32 is not None and zlib.crc32(data) != crc32:
        raise DecodeError("checksum", f"the bytes at {offset} are not those that were indexed")
    return data


def admit(data: bytes, extension: str, limits: Limits) -> None:
    """Raise DecodeError for data that must not reach a decoder: empty, too large, or of no known container."""
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
    if data[:4] == b"RIFF":
        return "avi" if data[8:12] == b"AVI " else None
    if known := next((name for magic, name in _MAGIC.items() if data.startswith(magic)), None):
        return known
    head = data[: _SYNCS * 192]
    for step in (188, 192):  # transport streams, plain and as camcorders write them; a capture begins anywhere
        for first in range(step):
            marks = head[first::step]
            if len(marks) >= 3 and marks.count(_SYNC) == len(marks):
                return "mpegts"
    return None


def check_pixels(height: int, width: int, limits: Limits) -> None:
    """Raise DecodeError for frames that are too large to decode."""
    if height * width > limits.pixels:
        raise DecodeError("pixels", f"{width}x{height} pixels, data.limits.pixels is {limits.pixels}")


def open_image(data: bytes, limits: Limits, resize: tuple[int, int] | None = None) -> np.ndarray:
    """Decode an image, `(H, W, 3)` uint8, upright, as a browser shows it; its format is recognised by its content."""
    try:
        with opened_image(data) as image:
            check_pixels(image.height, image.width, limits)
            rgb = _as_rgb(ImageOps.exif_transpose(image))
    except Image.DecompressionBombError as error:
        raise DecodeError("pixels", str(error)) from error
    return np.asarray(rgb if resize is None else rgb.resize(resize[::-1], Image.Resampling.BICUBIC))


def opened_image(data: bytes) -> Image.Image:
    """An image whose pixels aren't decoded yet, of one of the known formats."""
    try:
        return Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
    except UnidentifiedImageError as error:
        known = ", ".join(IMAGE_FORMATS)
        raise DecodeError("undecodable", f"no image ({known}); it begins with {data[:8]!r}") from error


def _as_rgb(image: Image.Image) -> Image.Image:
    """Eight bits of each colour of sRGB, on white where the image is transparent."""
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would cut off at 255
        levels = np.asarray(image).astype(np.int64)
        image = Image.fromarray((np.clip(levels, 0, 65535) >> 8).astype(np.uint8))
    if image.mode == "F":
        raise DecodeError("undecodable", "an image of floating-point numbers, whose white isn't known")
    if image.has_transparency_data:
        return Image.fromarray(on_white(np.asarray(in_srgb(image.convert("RGBA")))))
    return in_srgb(image if image.mode in ("L", "CMYK") else image.convert("RGB")).convert("RGB")


def on_white(picture_HWC: np.ndarray) -> np.ndarray:
    """A picture of red, green, blue and alpha, uint8, laid on white."""
    alpha = picture_HWC[..., 3:].astype(np.uint16)
    return ((picture_HWC[..., :3] * alpha + _WHITE * (255 - alpha) + 127) // 255).astype(np.uint8)


def shown_at(times: np.ndarray, frames: Sequence[float] | np.ndarray, fps: float) -> list[int]:
    """Frames on the screen in the middle of each numbered interval; `times` are seconds, ascending."""
    middle = times[0] + (np.asarray(frames, dtype=np.float64) + 0.5) / fps
    return (np.searchsorted(times, middle, side="right") - 1).tolist()
