"""The packets of a video's stream in file order: the frames that they show, and where decoding may begin.

Nothing is decoded, and the container's seek is not used: it only lists the packets. A frame is found by its
presentation time, from the last packet before it that depends on no earlier one (`bitstream.py`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from sora_train.data.read.bitstream import INTRA, is_entry, is_intact, is_shown
from sora_train.data.read.decode import DecodeError

_UNTIMED = "avi"  # packets have a place in the file there, and FFmpeg guesses when they are shown
_DEFAULT = 5_000_000  # pixels that the mark counts
_NEVER = -(1 << 62)  # stamp of a packet without one
_CHECKS = {  # further checks of FFmpeg's decoders that what is whole passes
    "h264": "aggressive",  # bits left over at the end of a slice (CAVLC)
    "hevc": "crccheck",  # of pictures whose hashes an encoder wrote beside them
}


class Line(NamedTuple):
    """The time line of a stream, from its packets alone; one entry a packet in the order of the file."""

    stamps: np.ndarray  # when its frame is shown, in the stream's time base
    shown: np.ndarray  # bool: an edit list hides a frame, and some only serve others
    entries: np.ndarray  # bool: decoding may begin here
    careful: bool  # counting from a key packet goes wrong: keys that can't be decoded alone, open groups, hidden frames
    unclear: bool  # the packets don't say which frames come out, or when
    cut: bool = False  # the file ends inside a packet
    broken: tuple[int, ...] = ()  # places of packets that can be told to be damaged without decoding them


def choose_stream(file: Any, wanted: int = -1) -> Any:
    """Choose the video stream to read, and set it to decode in this thread with all checks.

    This is the stream numbered `wanted`, chosen by the index; otherwise the one that the ffmpeg program would choose:
    the largest, with default streams first, and no cover picture. Raises DecodeError if there is none.
    """
    streams = file.streams.video
    flags: Any = type(streams[0].disposition) if streams else None
    found = [s for s in streams if not s.disposition & flags.attached_pic and wanted in (-1, s.index)]
    found.sort(key=lambda s: -s.width * s.height - _DEFAULT * bool(s.disposition & flags.default))
    if not found:
        raise DecodeError("no_video", "there is no video stream in it")
    stream, codec = found[0], found[0].codec_context
    stream.thread_type, codec.thread_count = "NONE", 1
    if codec.name in _CHECKS:
        codec.options = {"err_detect": _CHECKS[codec.name]}
    return stream


def read_packets(file: Any, stream: Any) -> list[Any]:
    """Read all packets of a stream that have data. Raises DecodeError if there is none."""
    packets = [packet for packet in file.demux(stream) if packet.size]
    if not packets:
        raise DecodeError("no_video", "there is no frame in it")
    return packets


def read_line(file: Any, stream: Any, packets: list[Any]) -> Line:
    """The time line of a stream's packets."""
    codec, record = stream.codec_context.name, stream.codec_context.extradata or b""
    cut = np.array([packet.is_corrupt for packet in packets])
    keys = np.array([packet.is_keyframe for packet in packets])
    entries = np.array([bool(p.is_keyframe) and is_entry(codec, memoryview(p), record) for p in packets])
    hidden = cut | np.array([p.is_discard or not is_shown(codec, memoryview(p)) for p in packets])
    stamps = [packet.pts for packet in packets]
    timed = file.format.name != _UNTIMED and not all(stamp is None for stamp in stamps)
    if not timed:
        stamps = [packet.dts for packet in packets]
    lost = np.array([stamp is None for stamp in stamps])
    if lost.all():
        raise DecodeError("timeline", "has frames without a time")
    known = np.array([_NEVER if stamp is None else stamp for stamp in stamps], dtype=np.int64)
    line = judge(known, keys, entries, hidden | lost)
    unclear = line.unclear or bool(lost.any()) or not (timed or codec in INTRA)
    broken = tuple(n for n, p in enumerate(packets) if not is_intact(codec, bytes(p), 0, p.size, record))
    careful = line.careful or unclear or bool(broken)
    return line._replace(unclear=unclear, careful=careful, cut=bool(cut.any()), broken=broken)


def judge(stamps: np.ndarray, keys: np.ndarray, entries: np.ndarray, hidden: np.ndarray) -> Line:
    """Build the time line. `keys` are the key packets of the container, `entries` where decoding may begin."""
    places = np.arange(len(stamps))
    at = np.maximum.accumulate(np.where(entries, places, -1))
    leading = (at >= 0) & (stamps < stamps[at])
    second = places[entries][1] if entries.sum() > 1 else len(stamps)
    twice = len(np.unique(stamps[~hidden])) < (~hidden).sum()
    unclear = bool(twice or not entries[0] or leading[:second].any())
    careful = unclear or bool((keys & ~entries).any() or leading.any() or hidden.any())
    return Line(stamps, ~hidden, entries, careful, unclear)


def is_told(line: Line, out: list[int | None], file: Any) -> bool:
    """Tell whether the packets tell when each frame is shown of those that come `out` of a decode from the start."""
    stamps = np.sort(line.stamps[line.shown]).tolist()
    return out == stamps or (file.format.name == _UNTIMED and len(out) == len(stamps))


def times_of(line: Line, count: int, time_base: float) -> np.ndarray:
    """Seconds at which `count` frames are shown, ascending: of a sequential stream too, if it shows so many."""
    stamps = np.sort(line.stamps[line.shown])
    if not count:
        raise DecodeError("no_video", "no frame of it is shown")
    if len(stamps) < count:
        raise DecodeError("timeline", f"{count} frames come out, and {len(stamps)} packets have a time")
    return stamps[:count] * time_base
