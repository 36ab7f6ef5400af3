"""Checksums that Matroska files carry: FFmpeg writes one into each cluster, and doesn't compare it when it reads.

An element (RFC 8794) is an identifier, a size and that many bytes, of which the first may be a CRC-32 of the rest.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator

_SEGMENT = 0x18538067
_OF_FRAMES = (0x1549A966, 0x1654AE6B, 0x1F43B675)  # what frames depend on: Info, Tracks, Cluster
_CHECKSUM = b"\xbf\x84"  # identifier and size of a CRC-32
_HELD = 6  # bytes of the whole element


def broken_element(data: bytes) -> int | None:
    """Place of the first element whose checksum doesn't fit; None where all do, as far as there are any."""
    view = memoryview(data)
    for begin, end in _elements(data):
        told = begin + _HELD
        if view[begin : begin + 2] != _CHECKSUM or end < told:
            continue
        if int.from_bytes(view[begin + 2 : told], "little") != zlib.crc32(view[told:end]):
            return begin
    return None


def _elements(data: bytes) -> Iterator[tuple[int, int]]:
    """Begin and end of the contents of what frames depend on in the segment, as far as the file is whole."""
    at = 0
    while at < len(data):
        identifier, behind, _ = _number(data, at)
        size, begin, width = _number(data, behind)
        if not identifier or not width:
            return
        if identifier == _SEGMENT:
            at = begin
            continue
        size &= (1 << 7 * width) - 1
        end = begin + size
        if size == (1 << 7 * width) - 1 or end > len(data):  # of unknown size, or cut off
            return
        if identifier in _OF_FRAMES:
            yield begin, end
        at = end


def _number(data: bytes, at: int) -> tuple[int, int, int]:
    """A number with its length in its leading zeros: all of its bits, the place behind it, its bytes (0: none)."""
    width = 9 - data[at].bit_length() if at < len(data) else 9
    if width > 8 or at + width > len(data):
        return 0, at, 0
    return int.from_bytes(data[at : at + width], "big"), at + width, width
