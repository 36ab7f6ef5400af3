"""HEVC rows that don't end where the next one is declared to begin: damage that FFmpeg doesn't report.

With wavefront parallel processing, which x265 uses by default, a slice header states the byte at which each row of
blocks begins. A single thread decodes a row from where the previous one ended; several threads start at the stated
bytes. For a damaged row and those below it the two decodings give different pictures.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import av
import numpy as np

from sora_train.data.read.bitstream import LENGTHS, units

_PICTURE_PARAMETERS = 34  # type of a unit


def has_rows(codec: Any, packets: Sequence[Any]) -> bool:
    """Tell whether a stream is HEVC of which each row of blocks has a known beginning."""
    if codec.name != "hevc":
        return False
    record = codec.extradata or b""
    first = bytes(packets[0])
    found = [*_units_of(record), *(first[begin:end] for begin, end in units("hevc", first, record))]
    parameters = [unit for unit in found if len(unit) > 2 and unit[0] >> 1 & 63 == _PICTURE_PARAMETERS]
    return bool(parameters) and all(_is_synchronized(unit) for unit in parameters)


def _units_of(record: bytes) -> Iterator[bytes]:
    """Units of the decoder's record (ISO/IEC 14496-15, 8.3.3.1), or between start codes."""
    at = LENGTHS["hevc"] + 2
    if record[:1] != b"\1":
        yield from (record[begin:end] for begin, end in units("hevc", record, b""))
        return
    for _ in range(record[at - 1] if len(record) >= at else 0):
        count, at = int.from_bytes(record[at + 1 : at + 3], "big"), at + 3
        for _ in range(count):
            size, at = int.from_bytes(record[at : at + 2], "big"), at + 2
            yield record[at : at + size]
            at += size


class _Bits:
    """Numbers of a unit's header."""

    def __init__(self, data: bytes) -> None:
        self.text = "".join(f"{byte:08b}" for byte in data.replace(b"\0\0\3", b"\0\0"))

    def read(self, count: int = 1) -> int:
        taken, self.text = self.text[:count], self.text[count:]
        return int(taken, 2)

    def golomb(self) -> int:
        zeros = self.text.index("1")
        return self.read(2 * zeros + 1) - 1


def _is_synchronized(unit: bytes) -> bool:
    """Tell whether picture parameters have entropy_coding_sync_enabled_flag set (H.265, 7.3.2.3.1)."""
    bits = _Bits(unit[2:])
    try:
        bits.golomb(), bits.golomb()  # numbers of the sets
        bits.read(7)
        bits.golomb(), bits.golomb(), bits.golomb()  # references of both lists, quantizer
        bits.read(2)
        if bits.read():  # cu_qp_delta_enabled_flag
            bits.golomb()
        bits.golomb(), bits.golomb()  # offsets of chroma
        bits.read(5)
        return bool(bits.read())
    except ValueError:  # they end before
        return False


def digest(frame: Any) -> int:
    """A checksum of a frame's pixels."""
    sums = 0
    for plane, component in zip(frame.planes, frame.format.components, strict=False):
        rows = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)
        width = plane.width * (1 + (component.bits > 8))
        sums = zlib.crc32(rows[: plane.height, :width].tobytes(), sums)
    return sums


def first_differing(codec: Any, packets: Sequence[Any], digests: Sequence[int]) -> int | None:
    """Number of the first frame for which decoding with two threads differs from decoding with one."""
    decoder = av.CodecContext.create("hevc", "r")
    decoder.extradata, decoder.thread_type, decoder.thread_count = codec.extradata, "SLICE", 2
    number = 0
    for packet in (*packets, None):
        try:
            frames = decoder.decode(av.Packet(bytes(packet)) if packet is not None else None)
        except av.error.FFmpegError:
            return number
        for frame in frames:
            if number >= len(digests) or digest(frame) != digests[number]:
                return number
            number += 1
    return number if number < len(digests) else None
