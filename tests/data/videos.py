"""Videos whose frames carry their number, in the forms that time lines come in."""

from __future__ import annotations

import io
from collections.abc import Collection, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

HEIGHT, WIDTH = 96, 128
_BITS = 8
_TICKS = 12000


def numbered(number: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """A picture with `number` in bright and dark columns along its upper half."""
    picture = np.full((height, width, 3), 16, np.uint8)
    for bit in range(_BITS):
        if number >> bit & 1:
            picture[: height // 2, bit * width // _BITS : (bit + 1) * width // _BITS] = 235
    return picture


def number_of(picture: np.ndarray) -> int:
    """The number in a picture of any size, upright."""
    height, width = picture.shape[:2]
    columns = [picture[height // 4, int((bit + 0.5) * width / _BITS)].mean() > 120 for bit in range(_BITS)]
    return sum(1 << bit for bit, bright in enumerate(columns) if bright)


def write_video(
    path: Path,
    times: Sequence[float],
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    gop: int = 12,
    size: tuple[int, int] = (HEIGHT, WIDTH),
    codec_options: dict[str, str] | None = None,
) -> bytes:
    """Write a numbered video whose frame k is shown from `times[k]` on, and return its bytes."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=30)
        stream.height, stream.width, stream.pix_fmt = *size, pixel_format
        stream.codec_context.time_base = Fraction(1, _TICKS)
        stream.codec_context.gop_size = gop
        stream.codec_context.thread_count = 1
        stream.options = codec_options or {}
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(numbered(number, *size), format="rgb24").reformat(format=pixel_format)
            frame.pts, frame.time_base = round(time * _TICKS), Fraction(1, _TICKS)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path.read_bytes()


def cut(source: bytes, path: Path, seconds: float) -> bytes:
    """The same packets with everything before `seconds` hidden by an edit list, as `ffmpeg -ss -c copy` leaves it."""
    with av.open(io.BytesIO(source)) as given, av.open(str(path), "w") as out:
        stream = given.streams.video[0]
        copy = out.add_stream_from_template(stream)
        shift = int(seconds / stream.time_base)
        for packet in given.demux(stream):
            if packet.dts is not None:
                packet.stream, packet.pts, packet.dts = copy, packet.pts - shift, packet.dts - shift
                out.mux(packet)
    return path.read_bytes()


def hiding(source: bytes, path: Path, hidden: Collection[int]) -> bytes:
    """A VP8 video of which some frames, by number, only serve others, as libvpx's alternate references do.

    Those that are shown follow each other at the same rate; a hidden one has the time right after the one before it.
    """
    with av.open(io.BytesIO(source)) as given, av.open(str(path), "w") as out:
        stream = given.streams.video[0]
        copy = out.add_stream_from_template(stream)
        shown = 0
        for number, packet in enumerate(packet for packet in given.demux(stream) if packet.size):
            data = bytearray(bytes(packet))
            if number in hidden:
                data[0] &= ~16  # show_frame, RFC 6386, 9.1
            moved = av.Packet(bytes(data))
            moved.pts = moved.dts = round(shown * 1000 / 30) - 32 * (number in hidden)
            moved.time_base, moved.is_keyframe, moved.stream = Fraction(1, 1000), packet.is_keyframe, copy
            shown += number not in hidden
            out.mux(moved)
    return path.read_bytes()


def turned(source: bytes, degrees: int, height: int = HEIGHT, width: int = WIDTH) -> bytes:
    """An mp4 with a display matrix that says to turn its pictures clockwise."""
    one = 1 << 16
    matrix = {
        90: (0, one, 0, -one, 0, 0, height * one, 0, 1 << 30),
        180: (-one, 0, 0, 0, -one, 0, width * one, height * one, 1 << 30),
        270: (0, -one, 0, one, 0, 0, 0, width * one, 1 << 30),
    }[degrees]
    data = bytearray(source)
    at = data.index(b"tkhd") + 44  # of a version 0 box
    data[at : at + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in matrix)
    return bytes(data)
