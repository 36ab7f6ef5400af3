"""Videos and pictures to and from files, by PyAV and Pillow. Frames are `(T, H, W, 3)` uint8 RGB.

For samples, demo data and tests. Training data is decoded by `data/read/decode.py` instead.
"""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from PIL import Image


@dataclass(frozen=True)
class Coding:
    """Encoding of frames to a file: container, encoder, its quality (lower is better) and key frames."""

    container: str = "mp4"
    encoder: str = "libx264"
    crf: int = 18
    gop: int = 12
    options: Mapping[str, str] = field(default_factory=dict)  # of the encoder


# mbtree's SIMD code isn't deterministic: the same frames sometimes give other bytes (observed in 1 of 40 clips)
_H264 = {"preset": "veryfast", "mbtree": "0"}
_VP9 = {"deadline": "good", "cpu-used": "4", "b": "0"}
_BT601 = 6  # H.273 code of primaries and transfer, to which swscale converts; with it players show the right colours


def write_mp4(
    target: str | os.PathLike[str] | BinaryIO,
    frames_THWC: np.ndarray | Iterable[np.ndarray],
    fps: float,
    crf: int = 18,
    gop: int = 12,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write frames as H.264 (yuv420p, index in front) to a path, atomically, or to an open binary file.

    The same frames give the same bytes. Odd sizes are padded by repeating the last row or column.

    Args:
        target: Path or open binary file.
        frames_THWC: uint8 RGB frames, as one array or as an iterable of arrays that are encoded one after the other,
            so that a long video never has to be in memory as a whole.
        fps: Frames per second.
        crf: Constant rate factor of x264; lower is better quality.
        gop: Distance of key frames, in frames.
        metadata: Tags of the container.

    Raises:
        ValueError: The frames have another shape or type.
    """
    if not isinstance(target, (str, os.PathLike)):
        target.write(encode_mp4(frames_THWC, fps, crf, gop, metadata))
        return
    coding = Coding(crf=crf, gop=gop, options=_H264)
    _write(Path(target), lambda path: _encode(path, frames_THWC, fps, coding, metadata or {}))


def write_webm(
    path: str | os.PathLike[str],
    frames_THWC: np.ndarray | Iterable[np.ndarray],
    fps: float,
    crf: int = 24,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write frames as VP9 in WebM, atomically; otherwise as `write_mp4`."""
    coding = Coding("webm", "libvpx-vp9", crf, 128, _VP9)
    _write(Path(path), lambda temporary: _encode(temporary, frames_THWC, fps, coding, metadata or {}))


def write_gif(
    path: str | os.PathLike[str], frames_THWC: np.ndarray | Iterable[np.ndarray], fps: float, comment: str = ""
) -> None:
    """Write frames as a GIF that loops endlessly, atomically. All frames are in memory at once.

    The time unit of a GIF is 1/100 s. The end of each frame is rounded to it, so that rounding errors don't add up.
    """
    pieces = [frames_THWC] if isinstance(frames_THWC, np.ndarray) else frames_THWC
    pictures = [Image.fromarray(frame) for frame in chain.from_iterable(pieces)]
    ends = [round(100 * (n + 1) / fps) for n in range(len(pictures))]
    shown = [10 * max(1, end - start) for start, end in zip([0, *ends], ends, strict=False)]
    _write(
        Path(path),
        lambda temporary: pictures[0].save(
            temporary, format="GIF", save_all=True, append_images=pictures[1:], duration=shown, loop=0, disposal=1,
            comment=comment.encode(),
        ),
    )  # fmt: skip


def encode_mp4(
    frames_THWC: np.ndarray | Iterable[np.ndarray],
    fps: float,
    crf: int = 18,
    gop: int = 12,
    metadata: Mapping[str, str] | None = None,
) -> bytes:
    """Encode frames like `write_mp4`, and return the file's bytes."""
    # FFmpeg moves the index to the front by reading its own output again, which requires a named file.
    with tempfile.TemporaryDirectory(prefix="sora_train_") as folder:
        path = Path(folder) / "clip.mp4"
        _encode(path, frames_THWC, fps, Coding(crf=crf, gop=gop, options=_H264), metadata or {})
        return path.read_bytes()


def read_mp4(source: str | os.PathLike[str] | bytes) -> tuple[np.ndarray, float]:
    """Decode a small video, given as a path or as bytes.

    Returns:
        All frames, `(T, H, W, 3)` uint8, and the frames per second.

    Raises:
        ValueError: No video can be read from it.
    """
    opened = io.BytesIO(source) if isinstance(source, bytes) else os.fspath(source)
    try:
        with av.open(opened, "r") as container:
            stream = container.streams.video[0]
            converter = VideoReformatter()  # one for all frames, as its set-up takes time
            frames = [converter.reformat(frame, format="rgb24").to_ndarray() for frame in container.decode(stream)]
            rate = stream.average_rate or stream.guessed_rate
    except (av.error.FFmpegError, IndexError) as error:
        raise ValueError(f"no video can be read: {error}") from error
    if not frames or rate is None:
        raise ValueError("no video can be read: no frames, or no frame rate")
    return np.stack(frames), float(rate)


def contact_sheet(frames_THWC: np.ndarray, columns: int = 8, scale: float = 1.0) -> Image.Image:
    """Picture of up to `columns` evenly spaced frames side by side, the first and the last included."""
    _check(frames_THWC)
    count = min(columns, len(frames_THWC))
    chosen = np.linspace(0, len(frames_THWC) - 1, count).round().astype(int)
    sheet = Image.fromarray(np.concatenate(list(frames_THWC[chosen]), axis=1))
    if scale == 1.0:
        return sheet
    size = (max(1, round(sheet.width * scale)), max(1, round(sheet.height * scale)))
    return sheet.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BOX)


def write_png(path: str | os.PathLike[str], picture: np.ndarray | Image.Image) -> None:
    """Write a picture, `(H, W, 3)` uint8 or a Pillow image, as PNG, atomically."""
    image = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    _write(Path(path), lambda temporary: image.save(temporary, format="PNG"))


def _write(path: Path, save: Callable[[Path], None]) -> None:
    """Write a file atomically: `save` writes a temporary file, which is then renamed to `path`."""
    temporary = path.with_name(f".{path.name[-200:]}.{os.getpid()}.tmp")
    try:
        save(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _check(frames_THWC: np.ndarray) -> None:
    if frames_THWC.ndim != 4 or frames_THWC.shape[-1] != 3 or frames_THWC.dtype != np.uint8 or not frames_THWC.size:
        raise ValueError(f"frames must be (T, H, W, 3) uint8, not {frames_THWC.shape} {frames_THWC.dtype}")


def _encode(
    path: Path, frames_THWC: np.ndarray | Iterable[np.ndarray], fps: float, coding: Coding, metadata: Mapping[str, str]
) -> None:
    pieces = iter([frames_THWC] if isinstance(frames_THWC, np.ndarray) else frames_THWC)
    first = next(pieces, np.zeros(0))
    _check(first)
    height, width = first.shape[1:3]
    flags = "+faststart+use_metadata_tags" if metadata else "+faststart"
    muxing = {"movflags": flags} if coding.container == "mp4" else {}
    with av.open(str(path), "w", format=coding.container, options=muxing) as container:
        container.metadata.update(metadata)
        stream: Any = container.add_stream(coding.encoder, rate=Fraction(fps).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt = width + width % 2, height + height % 2, "yuv420p"
        codec = stream.codec_context
        codec.thread_count = 1  # several threads would make the bytes depend on their number
        codec.gop_size = coding.gop
        codec.options = {"crf": str(coding.crf), **coding.options}
        codec.colorspace, codec.color_range = int(Colorspace.ITU601), int(ColorRange.MPEG)
        codec.color_primaries = codec.color_trc = _BT601
        for number, picture in enumerate(chain.from_iterable(chain([first], pieces))):
            even = np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            frame = av.VideoFrame.from_ndarray(even, format="rgb24")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
