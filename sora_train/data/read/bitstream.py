"""Facts in the first bytes of packets: whether decoding can start there, and whether the packet yields a frame.

Containers mark key packets as the muxer was told, which may be wrong. The streams state it themselves in the header of
a unit or picture: H.264 (ITU-T H.264, 7.3.1 and D.1.8), HEVC (H.265, 7.4.2.2), VP8 (RFC 6386, 9.1), VP9 (bitstream
specification 0.7, 6.2), MPEG-4 (ISO/IEC 14496-2, 6.2.5), MPEG-1 and 2 (ISO/IEC 13818-2, 6.2.3).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

# codecs of which every picture stands alone
INTRA = (
    "mjpeg", "mjpegb", "prores", "dnxhd", "dvvideo", "rawvideo", "png", "jpeg2000", "huffyuv", "ffvhuff", "utvideo",
    "v210", "v410", "magicyuv", "cfhd", "hap", "ljpeg", "jpegls", "qoi", "bmp", "tiff",
)  # fmt: skip
LENGTHS = {"h264": 4, "hevc": 21}  # which byte of the decoder's record says how long the lengths before its units are
_SEARCHED = 1 << 16  # bytes of a packet in which a start code is looked for
_RECOVERY_POINT = 6  # type of an H.264 SEI message
_X264 = re.compile(rb"x264 - core (\d+)")
Bytes = bytes | memoryview


def units(codec: str, packet: Bytes, record: bytes) -> Iterator[tuple[int, int]]:
    """Begin and end of each unit (NAL) of an H.264 or HEVC packet; `record` is the decoder's extradata.

    In mp4 and Matroska units have their lengths before them (ISO/IEC 14496-15, 5.3.2 and 8.3.2), elsewhere start codes.
    """
    place = LENGTHS[codec]
    if len(record) > place and record[0] == 1:
        width, at = (record[place] & 3) + 1, 0
        while at + width < len(packet):
            size = int.from_bytes(packet[at : at + width], "big")
            yield at + width, min(len(packet), at + width + size)
            at += width + size
        return
    codes = [match.end() for match in re.finditer(b"\0\0\1", packet)]
    yield from zip(codes, [*(code - 3 for code in codes[1:]), len(packet)], strict=True)


def is_intact(codec: str, data: bytes, start: int, end: int, record: bytes) -> bool:
    """Tell whether the units of an H.264 or HEVC packet, data[start:end], fill it exactly, without three zero bytes.

    Encoders escape three zeros inside a unit. FFmpeg interprets them as the unit's end without an error, but in units
    with a length prefix they are damage. True for other codecs.
    """
    place = LENGTHS.get(codec)
    if place is None or len(record) <= place or record[0] != 1:
        return True
    width, at = (record[place] & 3) + 1, start
    while at + width < end:
        first = at + width
        at = first + int.from_bytes(data[at:first], "big")
        if at > end:
            return False
        found = data.find(b"\0\0\0", first, at)
        if found >= 0 and data[found:at].strip(b"\0"):  # zeros at the end of a unit are padding
            return False
    return at == end


def is_slice(codec: str, first: int) -> bool:
    """Tell whether a unit with this first byte contains a picture or a part of one."""
    return first >> 1 & 63 < 32 if codec == "hevc" else 1 <= first & 31 <= 5


def is_entry(codec: str, packet: Bytes, record: bytes) -> bool:
    """Tell whether everything shown from this packet on can be decoded without earlier packets.

    For codecs that are not known here, the container's key packets are taken for such entries.
    """
    check = _ENTRIES.get(codec)
    return check is None or (len(packet) > 0 and check(packet, record))


def is_shown(codec: str, packet: Bytes) -> bool:
    """Tell whether a frame comes out of a packet: VP8 has pictures that only serve others."""
    return codec != "vp8" or len(packet) == 0 or bool(packet[0] & 16)


def needs_first_packet(codec: str, pixel_format: str, first: Bytes) -> bool:
    """Tell whether decoding needs the first packet, in which an old x264 names its version and so its faults."""
    found = _X264.search(first[:_SEARCHED]) if codec == "h264" else None
    version = int(found[1]) if found else 1 << 30
    return version <= 33 or (version < 151 and "444" in pixel_format)


def _h264(packet: Bytes, record: bytes) -> bool:
    recovers = False
    for first, end in units("h264", packet, record):
        kind = packet[first] & 31 if first < end else 0
        if kind == 6:
            recovers = recovers or _recovers_at_once(bytes(packet[first + 1 : end]))
        elif 1 <= kind <= 5:
            return kind == 5 or recovers
    return False


def _recovers_at_once(messages: bytes) -> bool:
    """Tell whether SEI messages contain a recovery point that needs no further frame."""
    data, at = messages.replace(b"\0\0\3", b"\0\0"), 0
    while at + 2 < len(data):
        numbers = []
        for _ in range(2):  # type and size
            value = 0
            while at < len(data) and data[at] == 255:
                value, at = value + 255, at + 1
            numbers.append(value + (data[at] if at < len(data) else 0))
            at += 1
        kind, size = numbers
        if kind == _RECOVERY_POINT:
            return at < len(data) and bool(data[at] & 128)  # ue(v): one bit set is 0
        at += size
    return False


def _hevc(packet: Bytes, record: bytes) -> bool:
    for first, end in units("hevc", packet, record):
        if first < end and is_slice("hevc", packet[first]):
            return 16 <= packet[first] >> 1 & 63 <= 23
    return False


def _vp9(packet: Bytes, record: bytes) -> bool:
    profile = packet[0] >> 5 & 1 | packet[0] >> 3 & 2  # bits from the left: marker (2), profile (2, low one first)
    shift = 2 if profile == 3 else 3  # profile 3 has a reserved bit; then show_existing_frame, frame_type
    return packet[0] >> 6 == 2 and packet[0] >> shift & 1 == 0 and packet[0] >> (shift - 1) & 1 == 0


def _after(code: bytes, shift: int, mask: int, wanted: int, byte: int) -> Callable[[Bytes, bytes], bool]:
    """A check that a field in the header which a start code begins has a value."""

    def check(packet: Bytes, record: bytes) -> bool:
        head = bytes(packet[:_SEARCHED])
        at = head.find(b"\0\0\1" + code)
        return at >= 0 and at + 4 + byte < len(head) and head[at + 4 + byte] >> shift & mask == wanted

    return check


_MPEG = _after(b"\0", 3, 7, 1, 1)  # picture_coding_type of an I picture
_ENTRIES: dict[str, Callable[[Bytes, bytes], bool]] = {
    "h264": _h264, "hevc": _hevc, "vp9": _vp9, "vp8": lambda packet, record: packet[0] & 1 == 0,
    "mpeg4": _after(b"\xb6", 6, 3, 0, 0), "mpeg1video": _MPEG, "mpeg2video": _MPEG,
}  # fmt: skip
