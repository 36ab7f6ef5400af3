"""H.264 slices whose picture is complete before their bytes end: damage that FFmpeg doesn't report.

A CABAC slice is one arithmetic code. After a flipped bit it decodes to other symbols, all of them valid, until the last
block of the picture; then either bytes are missing, which FFmpeg reports, or bytes are left over, which it doesn't. To
find the latter, the slice is decoded without its last bytes: an intact slice then causes an error report, while a slice
whose last bytes were never reached causes none. An intact slice may cause none by chance (about one in twenty), so
several lengths are tried.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import av
import numpy as np

from sora_train.data.read.bitstream import LENGTHS, is_slice, units

_WITHOUT_CABAC = ("Baseline", "Constrained Baseline", "Extended")  # profiles
_PADDING = re.compile(rb"(?<!\x00)(?:\x00\x00\x03)*\x00*\Z")  # after the last bit of a slice (cabac_zero_words)
_LEAST = 48  # bytes of a slice that is tried
_REFERENCE = 0x60  # bits of a unit's first byte (nal_ref_idc)
# how many last bytes are cut off, or replaced by ones, which a decoder soon takes for the end of the slice
_CUT, _ONES = False, True
_ENDS = (
    (16, _CUT), (12, _CUT), (24, _ONES), (24, _CUT), (10, _CUT), (20, _CUT), (16, _ONES), (14, _CUT), (18, _CUT),
    (8, _CUT), (22, _CUT),
)  # fmt: skip


class Reports(Protocol):
    """Reports of FFmpeg since they were last taken."""

    def take(self) -> list[str]: ...


class _Packet(NamedTuple):
    data: bytes
    begin: int  # of the unit, behind its length or start code
    end: int  # of what isn't padding
    stop: int  # of the unit
    width: int  # bytes of the length before it; 0: a start code
    is_reference: bool
    is_tried: bool

    def otherwise(self, count: int, ones: bool) -> bytes:
        """The packet with the slice's last bytes replaced by ones, or cut off."""
        data, last = self.data, self.end - count
        if ones:
            return data[:last] + b"\xff" * count + data[self.end :]
        length = (last - self.begin).to_bytes(self.width, "big") if self.width else b""
        return data[: self.begin - self.width] + length + data[self.begin : last] + data[self.stop :]


def first_unread(codec: Any, packets: Sequence[Any], entries: np.ndarray, reports: Reports) -> int | None:
    """Place of the first packet whose slice leaves bytes over, in a stream that decodes without any report.

    Packets of several slices and very short slices aren't tried. `entries` are the packets that decoding may begin at.
    """
    if codec.name != "h264" or codec.profile in _WITHOUT_CABAC:
        return None
    record = codec.extradata or b""
    decoder = av.CodecContext.create("h264", "r")
    decoder.extradata, decoder.thread_count = record, 1
    decoder.options = {"skip_idct": "all", "skip_loop_filter": "all"}
    begins = [0, *(int(place) for place in np.flatnonzero(entries) if place)]
    for begin, end in zip(begins, [*begins[1:], len(packets)], strict=True):
        group = [_parted(bytes(packet), record) for packet in packets[begin:end]]
        left = [place for place, one in enumerate(group) if one.is_tried]
        for count, ones in _ENDS:
            if not left:
                break
            changed = {place: group[place].otherwise(count, ones) for place in left}
            left = list(_unreported(decoder, group, changed, reports))
        if left:
            return begin + left[0]
    return None


def _parted(packet: bytes, record: bytes) -> _Packet:
    """A packet and its slice: the last, of several, none of which is tried."""
    place = LENGTHS["h264"]
    width = (record[place] & 3) + 1 if len(record) > place and record[0] == 1 else 0
    found = [
        (first, end) for first, end in units("h264", packet, record) if first < end and is_slice("h264", packet[first])
    ]
    if not found:
        return _Packet(packet, 0, 0, 0, width, True, False)
    begin, stop = found[-1]
    end = begin + len(_PADDING.sub(b"", packet[begin:stop]))
    is_reference = any(packet[first] & _REFERENCE for first, _ in found)
    return _Packet(packet, begin, end, stop, width, is_reference, len(found) == 1 and end - begin >= _LEAST)


def _unreported(decoder: Any, group: Sequence[_Packet], changed: dict[int, bytes], reports: Reports) -> Iterator[int]:
    """Places of the changed packets of which the decoder reports nothing; what no other needs is passed over."""
    if decoder.is_open:
        decoder.flush_buffers()
    for place in range(max(changed) + 1):
        if place not in changed and not group[place].is_reference:
            continue
        reports.take()
        try:
            decoder.decode(av.Packet(changed.get(place, group[place].data)))
        except av.error.FFmpegError:
            continue
        if place in changed and not reports.take():
            yield place
