"""What the index says of a video: frames counted from packets, the time line, rotation, size, codec.

Runs in a decode child. Nothing the container claims is taken over where the packets can say it: size and pixel format
are the decoder's, from the header of the first picture. Decoding that picture as well is a choice; with H.264 it costs
several times all the rest.
"""

from __future__ import annotations

import io
from contextlib import suppress
from typing import Any

import numpy as np
from PIL import Image

from sora_train.data.read.decode import (
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
from sora_train.data.read.mp4_tables import frame_times

_FASTEST = 1000.0  # frames a second; more is a broken time line
_LONGEST = 10 * 24 * 3600.0  # seconds
_SLICE = 128  # bytes of a slice; its header is shorter
_LENGTHS = {"h264": 4, "hevc": 21}  # which byte of the decoder's record says how long the lengths before its units are
_ORIENTATION, _ON_ITS_SIDE = 0x0112, (5, 6, 7, 8)  # of EXIF


def probe(data: bytes, extension: str, limits: Limits, pixels: bool = True) -> dict[str, Any]:
    """The index's figures of one video or image; raises DecodeError if it can't be used.

    `fps` is 0 for an image. `width` and `height` are those of the upright picture. `vfr` says that frames don't come
    at a constant rate, `careful` what `timeline` says. Without `pixels` no picture is decoded, beyond its header.
    """
    admit(data, extension, limits)
    return _still(data, limits, pixels) if extension in IMAGES else _video(data, limits, pixels)


def _still(data: bytes, limits: Limits, pixels: bool) -> dict[str, Any]:
    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            codec, pixel_format, (width, height) = str(image.format).lower(), image.mode, image.size
            check_pixels(height, width, limits)
            if pixels or codec == "png":  # whose orientation may stand behind its pixels
                height, width = open_image(data, limits).shape[:2]
            elif image.getexif().get(_ORIENTATION) in _ON_ITS_SIDE:
                height, width = width, height
    except Image.DecompressionBombError as error:
        raise DecodeError("pixels", str(error)) from error
    still = {"frames": 1, "fps": 0.0, "duration": 0.0, "vfr": False, "careful": False, "rotation": 0}
    return {**still, "width": width, "height": height, "codec": codec, "pixel_format": pixel_format}


def _video(data: bytes, limits: Limits, pixels: bool) -> dict[str, Any]:
    from av.stream import Discard

    with _opened(data) as file:
        stream = best_stream(file)
        check_pixels(stream.height, stream.width, limits)
        for other in file.streams:
            other.discard = Discard.default if other.index == stream.index else Discard.all
        times, careful = _times(data, file, stream, limits)
        if len(times) > limits.frames:
            raise DecodeError("frames", f"{len(times)} frames, data.limits.frames is {limits.frames}")
        fps, duration, vfr = rate(times, float(stream.average_rate or 0))
        first = _first(file, stream, pixels)
        check_pixels(first.height, first.width, limits)
        turns = round(first.rotation / 90) % 4
        height, width = (first.width, first.height) if turns % 2 else (first.height, first.width)
        return {
            "frames": len(times), "fps": fps, "duration": duration, "vfr": vfr, "careful": careful,
            "rotation": turns * 90, "width": width, "height": height,
            "codec": stream.codec_context.name, "pixel_format": first.format.name,
        }  # fmt: skip


def _times(data: bytes, file: Any, stream: Any, limits: Limits) -> tuple[np.ndarray, bool]:
    """Seconds at which frames are shown, ascending, and whether to be careful (see `timeline`).

    From the tables of a plain mp4, if FFmpeg counts as many frames in it; else from its packets.
    """
    found = frame_times(data, limits.frames) if file.format.name.startswith("mov") else None
    if found is None or stream.frames != len(found.ticks) or stream.time_base * found.scale != 1:
        stamps, _, careful = timeline(file, stream)
        return np.array(stamps, dtype=np.float64) * float(stream.time_base), careful
    key = np.maximum.accumulate(np.where(found.is_key, np.arange(len(found.ticks)), -1))
    careful = bool(((key >= 0) & (found.ticks < found.ticks[key])).any())
    return np.sort(found.ticks) / found.scale, careful


def _opened(data: bytes) -> Any:
    """The container, if possible without what FFmpeg decodes to find out about streams.

    Not possible for AVI, whose packets have no times of their own, and where there are several video streams: which of
    them is best is told from what was decoded, and decoders of training choose in that way.
    """
    import av

    kind = container(data)
    if kind != "avi":
        file = av.open(io.BytesIO(data), format=kind, options={"codec_whitelist": "none"}, metadata_errors="replace")
        if len(file.streams.video) == 1:
            return file
        file.close()
    return av.open(io.BytesIO(data), format=kind, metadata_errors="replace")


def _first(file: Any, stream: Any, pixels: bool) -> Any:
    """The first frame that comes out, to be sure that one does; without `pixels` only its header is decoded.

    A key frame by itself is tried first; where a decoder gives nothing for it, the file from its beginning.
    """
    import av

    codec = stream.codec_context
    if not pixels:
        codec.options = {"ec": "0"}  # what is cut off needn't be made up
    file.seek(0)
    packet = next((p for p in file.demux(stream) if p.is_keyframe and p.size), None)
    if packet is not None:
        alone = av.Packet(bytes(packet) if pixels else _beginning(bytes(packet), codec))
        alone.pts, alone.dts, alone.time_base = packet.pts, packet.dts, packet.time_base
        with suppress(av.error.FFmpegError):  # the second way says what is wrong
            for frame in (*codec.decode(alone), *codec.decode(None)):
                return frame
    file.seek(0)
    for frame in file.decode(stream):
        return frame
    raise DecodeError("undecodable", "no frame comes out of it")


def _beginning(packet: bytes, codec: Any) -> bytes:
    """An H.264 or HEVC packet as far as the header of its first slice; one of another form or codec as it is.

    The units of a packet in mp4 or Matroska have their lengths before them (ISO/IEC 14496-15, 5.3.2 and 8.3.2).
    """
    record, place = codec.extradata or b"", _LENGTHS.get(codec.name)
    if place is None or len(record) <= place or record[0] != 1:
        return packet
    width, at = (record[place] & 3) + 1, 0
    while at + width < len(packet):
        size = int.from_bytes(packet[at : at + width], "big")
        first = packet[at + width]
        is_slice = first >> 1 & 63 < 32 if codec.name == "hevc" else 1 <= first & 31 <= 5
        if size and is_slice:
            unit = packet[at + width : at + width + min(size, _SLICE)]
            return packet[:at] + len(unit).to_bytes(width, "big") + unit
        at += width + size
    return packet


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
