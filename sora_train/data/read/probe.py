"""Figures of a video for the index: frames counted from packets, the time line, rotation, size, codec.

Runs in a decode child. A container's claims are not used where the packets tell: size and pixel format are the
decoder's, from the header of the first picture. Decoding that picture too is optional; with H.264 it takes several
times as long as everything else.
"""

from __future__ import annotations

import io
from contextlib import suppress
from typing import Any

import numpy as np
from PIL import Image

from sora_train.data.read.bitstream import INTRA, LENGTHS, is_entry, is_intact, is_slice, needs_first_packet, units
from sora_train.data.read.decode import (
    IMAGES,
    DecodeError,
    Limits,
    Track,
    admit,
    check_pixels,
    container,
    open_image,
    opened_image,
    shown_at,
)
from sora_train.data.read.matroska import broken_element
from sora_train.data.read.mp4_tables import frame_times
from sora_train.data.read.orientation import from_matrix
from sora_train.data.read.packets import Line, choose_stream, is_told, judge, read_line, read_packets, times_of

_FASTEST = 1000.0  # frames a second; more is a broken time line
_LONGEST = 10 * 24 * 3600.0  # seconds
_SLICE = 128  # bytes of a slice; its header is shorter
_DECORD = ("h264", "hevc", "vp8", "vp9", "mpeg4")  # codecs, and below containers, that decord was tried with
_ITS_CONTAINERS = ("mov", "matroska")
HDR = {16: "pq", 18: "hlg"}  # transfer characteristics of H.273
_TAIL = 16  # frames at the end of a cut file behind which some may be missing: as many as decoders hold back
STILL = Track(frames=1, stream=0)
_ORIENTATION, _ON_ITS_SIDE = 0x0112, (5, 6, 7, 8)  # of EXIF


def probe(data: bytes, extension: str, limits: Limits, pixels: bool = True, whole: bool = False) -> dict[str, Any]:
    """Compute the index's figures of one video or image. Raises DecodeError if it can't be used.

    `fps` is 0 for an image. `width` and `height` are those of the displayed picture: upright, with square pixels. `vfr`
    is true if the frame rate isn't constant; the others are described in `Track`. Without `pixels` no picture is
    decoded beyond its header, unless only that shows which frames come out. With `whole` every picture is decoded, and
    a file with damage anywhere is refused.
    """
    admit(data, extension, limits)
    if extension in IMAGES:
        return _still(data, limits, pixels)
    if container(data) == "matroska" and (place := broken_element(data)) is not None:
        raise DecodeError("damaged", f"the checksum of the Matroska element at byte {place} doesn't fit it")
    return _video(data, limits, pixels, whole)


def _still(data: bytes, limits: Limits, pixels: bool) -> dict[str, Any]:
    try:
        with opened_image(data) as image:
            codec, pixel_format, (width, height) = str(image.format).lower(), image.mode, image.size
            check_pixels(height, width, limits)
            if pixels or codec == "png":  # whose orientation may stand behind its pixels
                height, width = open_image(data, limits).shape[:2]
            elif image.getexif().get(_ORIENTATION) in _ON_ITS_SIDE:
                height, width = width, height
    except Image.DecompressionBombError as error:
        raise DecodeError("pixels", str(error)) from error
    still = STILL._asdict() | {"duration": 0.0, "pixel_aspect": 1.0}
    return {**still, "width": width, "height": height, "codec": codec, "pixel_format": pixel_format}


def _video(data: bytes, limits: Limits, pixels: bool, whole: bool) -> dict[str, Any]:
    from av.stream import Discard

    from sora_train.data.read.by_pyav import Complaints, Source

    with Complaints() as complaints, _opened(data) as file:
        stream = choose_stream(file)
        check_pixels(stream.height, stream.width, limits)
        for other in file.streams:
            other.discard = Discard.default if other.index == stream.index else Discard.all
        line, packets = _line(data, file, stream, limits)
        cut = line.cut or any("ended prematurely" in said for said in complaints.take())
        if line.shown.sum() > limits.frames:
            raise DecodeError("frames", f"{line.shown.sum()} frames, data.limits.frames is {limits.frames}")
        first, packet = _first(file, stream, pixels)
        check_pixels(first.height, first.width, limits)
        codec = stream.codec_context.name
        sequential = line.unclear or needs_first_packet(codec, first.format.name, packet)
        count = int(line.shown.sum())
        out: list[Any] = []
        if sequential or whole:
            packets = packets or _packets(file, stream)
            source = Source(stream.codec_context, packets, line, complaints)
            stamps = _whole(source, cut) if whole else [frame.pts for frame in source.all()]
            out, count = (stamps, len(stamps)) if sequential else (out, count)
        times = times_of(line, count, float(stream.time_base or 1))
        claimed = _claimed(stream, times)
        times = _before_gap(times, claimed) if cut else times
        fps, duration, vfr = rate(times, claimed)
        if sequential and vfr and not is_told(line, out, file):
            raise DecodeError("timeline", "frames without a time, at a variable rate; copy or encode it anew")
        shape = shape_of(first, stream)
        check_pixels(shape["height"], shape["width"], limits)
        careful = line.careful or sequential or cut or shape["mirrored"] or not _is_for_decord(file, stream, first)
        return {
            **shape, "frames": len(times), "fps": fps, "duration": duration, "vfr": vfr, "careful": careful,
            "sequential": sequential, "stream": stream.index, "interlaced": bool(first.interlaced_frame),
            "transfer": HDR.get(int(first.color_trc), ""), "codec": codec, "pixel_format": first.format.name,
        }  # fmt: skip


def _whole(source: Any, cut: bool) -> list[int | None]:
    """When each frame is shown that comes out of a decode from the start; raises DecodeError where there is damage."""
    from sora_train.data.read import slice_ends, wavefront

    codec, packets = source.codec, source.packets
    stamps: list[int | None] = []
    digests: list[int] = []
    has_rows = wavefront.has_rows(codec, packets)
    for frame in source.all():
        stamps.append(frame.pts)
        if has_rows:
            digests.append(wavefront.digest(frame))
    source.refuse_damage(cut)
    place = slice_ends.first_unread(codec, packets, source.line.entries, source.complaints)
    if place is not None:
        raise DecodeError("damaged", f"packet {place} of {len(packets)}: its picture ends before its bytes do")
    number = wavefront.first_differing(codec, packets, digests) if has_rows and not cut else None
    if number is not None:
        raise DecodeError("damaged", f"frame {number} of {len(digests)}: a row of it ends where the next doesn't begin")
    return stamps


def _line(data: bytes, file: Any, stream: Any, limits: Limits) -> tuple[Line, list[Any]]:
    """The time line, and the packets that it is from, if it is.

    From the tables of a plain mp4, if FFmpeg counts as many frames in it; else from its packets.
    """
    found = frame_times(data, limits.frames) if file.format.name.startswith("mov") else None
    if found is None or stream.frames != len(found.ticks) or stream.time_base * found.scale != 1:
        packets = read_packets(file, stream)
        return read_line(file, stream, packets), packets
    codec, record = stream.codec_context.name, stream.codec_context.extradata or b""
    view, entries = memoryview(data), found.is_key.copy()
    if codec not in INTRA:
        for n in np.flatnonzero(found.is_key).tolist():
            entries[n] = is_entry(codec, view[found.places[n] : found.places[n] + found.sizes[n]], record)
    line = judge(found.ticks, found.is_key, entries, np.zeros(len(entries), dtype=bool))
    places = zip(found.places.tolist(), found.sizes.tolist(), strict=True)
    broken = tuple(n for n, (at, size) in enumerate(places) if not is_intact(codec, data, at, at + size, record))
    return line._replace(careful=line.careful or bool(broken), broken=broken), []


def _rewind(file: Any) -> None:
    import av

    try:
        file.seek(0)
    except av.error.FFmpegError as error:  # a demuxer that found no key packet
        raise DecodeError("undecodable", "no frame in it that decoding may begin at") from error


def _packets(file: Any, stream: Any) -> list[Any]:
    _rewind(file)
    return read_packets(file, stream)


def _before_gap(times: np.ndarray, claimed: float) -> np.ndarray:
    """Frames that are shown before some are missing at the end of a file that was cut."""
    steps = np.diff(times)
    if not len(steps):
        return times
    usual = min(float(np.median(steps)), 1 / claimed if claimed else np.inf)
    late = max(0, len(steps) - _TAIL)
    gaps = np.flatnonzero(steps[late:] > 1.5 * usual)
    return times[: 1 + late + int(gaps[0])] if len(gaps) else times


def _claimed(stream: Any, times: np.ndarray) -> float:
    """The rate that the container claims: of two, the one that the times of its frames are nearer to."""
    claims = [float(claim) for claim in (stream.average_rate, stream.base_rate) if claim]
    if len(times) < 2 or times[-1] <= times[0] or not claims:
        return claims[0] if claims else 0.0
    mean = (len(times) - 1) / float(times[-1] - times[0])
    return min(claims, key=lambda claim: abs(claim - mean))


def shape_of(first: Any, stream: Any) -> dict[str, Any]:
    """Size, pixel aspect and orientation of the picture as it is shown."""
    from av.sidedata.sidedata import Type

    matrix = first.side_data.get(Type.DISPLAYMATRIX)
    rotation, mirrored = from_matrix(None if matrix is None else bytes(matrix))
    height, width = first.height, first.width
    aspect = float(stream.sample_aspect_ratio or 1)
    if aspect > 1:  # the shorter side grows, as browsers have it: no pixel is lost
        width = round(width * aspect)
    elif 0 < aspect < 1:
        height = round(height / aspect)
    if rotation % 180:
        height, width = width, height
    return {"height": height, "width": width, "pixel_aspect": aspect, "rotation": rotation, "mirrored": mirrored}


def _is_for_decord(file: Any, stream: Any, first: Any) -> bool:
    """Tell whether decord reads this kind of file as it is shown: it chooses its stream by itself, and drops alpha."""
    known = file.format.name.startswith(_ITS_CONTAINERS) and stream.codec_context.name in _DECORD
    return known and len(file.streams.video) == 1 and not any(c.is_alpha for c in first.format.components)


def _opened(data: bytes) -> Any:
    """Open the container; in mp4 and Matroska FFmpeg then decodes nothing to find out about the streams."""
    import av

    kind = container(data)
    options = {"codec_whitelist": "none"} if kind in ("mov", "matroska") else {}
    return av.open(io.BytesIO(data), format=kind, options=options, metadata_errors="replace")


def _first(file: Any, stream: Any, pixels: bool) -> tuple[Any, bytes]:
    """The first frame that comes out, to be sure that one does, and the first key packet.

    Without `pixels` only the frame's header is decoded. The key frame by itself is tried first; where a decoder gives
    nothing for it, the file from its beginning.
    """
    import av

    codec = stream.codec_context
    if not pixels:
        codec.options |= {"ec": "0"}  # what is cut off needn't be made up
    _rewind(file)
    packet = next((p for p in file.demux(stream) if p.is_keyframe and p.size), None)
    if packet is not None:
        alone = av.Packet(bytes(packet) if pixels else _beginning(bytes(packet), codec))
        alone.pts, alone.dts, alone.time_base = packet.pts, packet.dts, packet.time_base
        with suppress(av.error.FFmpegError):  # the second way says what is wrong
            for frame in (*codec.decode(alone), *codec.decode(None)):
                return frame, bytes(packet)
    _rewind(file)
    codec.flush_buffers()
    for following in file.demux(stream):
        with suppress(av.error.FFmpegError):  # goes on behind what can't be decoded, as the ffmpeg program does
            for frame in codec.decode(following if following.size else None):
                return frame, b"" if packet is None else bytes(packet)
    raise DecodeError("undecodable", "no frame comes out of it")


def _beginning(packet: bytes, codec: Any) -> bytes:
    """An H.264 or HEVC packet as far as the header of its first slice; one of another form or codec as it is."""
    record = codec.extradata or b""
    if codec.name not in LENGTHS or len(record) <= LENGTHS[codec.name] or record[0] != 1:
        return packet
    width = (record[LENGTHS[codec.name]] & 3) + 1
    for first, end in units(codec.name, packet, record):
        if first < end and is_slice(codec.name, packet[first]):
            unit = packet[first : min(end, first + _SLICE)]
            return packet[: first - width] + len(unit).to_bytes(width, "big") + unit
    return packet


def rate(times: np.ndarray, claimed: float) -> tuple[float, float, bool]:
    """Frame rate (frames per second), duration (seconds), and whether the rate varies.

    Args:
        times: Presentation times of all frames in seconds, ascending.
        claimed: Frame rate according to the container; 0 if it gives none. It is used if each frame is shown in the
            middle of its interval at that rate. Otherwise the average rate is used.

    Raises:
        DecodeError: The times give no plausible rate.
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
