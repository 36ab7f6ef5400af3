"""Reader of tar headers that reports damage: every member in order, and every fault with the bytes it cost.

The tarfile library (and webdataset with it) stops silently at a damaged header, and accepts a file that is cut between
two members. This reader continues at the next intact header, and reports what was in between.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

BLOCK = 512
_NAMED = 1 << 20  # bytes that a long name or an extended header may have
_REGULAR = (b"0", b"\0", b"7")
_SCAN = 1 << 20
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\3\4": "zip"}


@dataclass(frozen=True)
class Member:
    """A file in a tar."""

    name: str
    offset: int  # of its data
    size: int
    header: int  # where its own header block is
    kind: str = "file"  # or "other": a link, a device


@dataclass(frozen=True)
class Fault:
    """A fault of a tar file: a word for counting, its offset, the number of bytes lost, and a sentence."""

    cause: str
    offset: int
    lost: int
    detail: str


def walk(file: BinaryIO, others: bool = False) -> Iterator[Member | Fault]:
    """Every regular member and every fault, in order. Links and devices only if `others`; folders are passed over."""
    descriptor, end = file.fileno(), os.fstat(file.fileno()).st_size
    extended: dict[str, str] = {}
    at = 0
    if end == 0:
        yield Fault("empty", 0, 0, "the shard has no bytes")
        return
    while True:
        block = os.pread(descriptor, BLOCK, at)
        if len(block) == BLOCK and block == bytes(BLOCK):
            following = _after_zeros(descriptor, at, end)
            if following == end:
                return
            detail = f"{following - at} zero bytes at {at}, where a member should begin"
            yield Fault("zeros", at, following - at, detail)
            at, extended = following, {}
            continue
        if len(block) < BLOCK:
            detail = f"ends at byte {end} without the end mark of a tar; it may have been cut between two members"
            yield Fault("no_end_mark", at, 0, detail)
            return
        try:
            name, size, kind = _header(block)
        except ValueError as error:
            if at == 0:
                packed = next((kind for magic, kind in _COMPRESSED.items() if block.startswith(magic)), None)
                hint = f"is compressed ({packed}): unpack it, videos don't get smaller" if packed else ""
                yield Fault("not_a_tar", 0, end, hint or f"begins with {block[:24]!r}")
                return
            following = _resync(descriptor, at + BLOCK, end)
            yield Fault("bad_header", at, following - at, f"{error} at {at}; {following - at} bytes are passed over")
            at, extended = following, {}
            continue
        data = at + BLOCK
        size = _number(extended["size"]) if "size" in extended and kind in _REGULAR else size
        stored = 0 if kind in b"123456" and kind not in _REGULAR else size
        if data + stored > end:
            yield Fault("truncated", at, end - at, f"{name!r} at {at} should have {size} bytes, {end - data} are there")
            return
        if kind in (b"x", b"L") and size <= _NAMED:
            extended |= _extended(kind, os.pread(descriptor, size, data))
        elif kind != b"g":
            if kind in _REGULAR:
                yield Member(extended.get("path", name), data, size, at)
            elif others and kind != b"5":
                yield Member(extended.get("path", name), data, 0, at, "other")
            extended = {}
        at = data + -(-stored // BLOCK) * BLOCK


def _header(block: bytes) -> tuple[str, int, bytes]:
    """Name, size and type of a header block; raises ValueError if it isn't one."""
    try:
        stated = _octal(block[148:156])
        size = _octal(block[124:136])
    except ValueError as error:
        raise ValueError("no member header") from error
    total = sum(block[:148]) + 8 * 32 + sum(block[156:])
    if stated != total:
        raise ValueError("a member header with a wrong checksum")
    name = _text(block[:100])
    if block[257:263] == b"ustar\0" and block[345] != 0:
        name = _text(block[345:500]) + "/" + name
    return name, size, block[156:157]


def _octal(field: bytes) -> int:
    """A number of a header: octal digits, or base 256 where the top bit is set. Never negative."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    return _number(digits.decode("ascii"), 8) if digits else 0


def _number(text: str, base: int = 10) -> int:
    if not text.isascii() or not text.isdigit():
        raise ValueError("not a number")
    return int(text, base)


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape").encode("utf-8", "replace").decode()


def _extended(kind: bytes, data: bytes) -> dict[str, str]:
    """Name and size of an extended (pax) header or a GNU long name; stops at a malformed line."""
    if kind == b"L":
        return {"path": _text(data)}
    found: dict[str, str] = {}
    while data:
        length, space, _ = data.partition(b" ")
        if not space or not length.isdigit() or not len(length) < int(length) <= len(data):
            break
        key, _, value = data[len(length) + 1 : int(length) - 1].partition(b"=")
        if key in (b"path", b"size"):
            text = value.decode("utf-8", "replace")
            if key == b"path" or text.isdigit():
                found[key.decode()] = text
        data = data[int(length) :]
    return found


def _after_zeros(descriptor: int, at: int, end: int) -> int:
    """Offset of the first block after `at` that isn't all zeros; `end` if there is none."""
    while at < end:
        part = os.pread(descriptor, _SCAN, at)
        kept = part.lstrip(b"\0")
        if kept:
            return at + (len(part) - len(kept)) // BLOCK * BLOCK
        at += len(part)
    return end


def _resync(descriptor: int, at: int, end: int) -> int:
    """The next block from `at` on that is an intact header with the mark of a tar; `end` if there is none."""
    while at < end:
        part = os.pread(descriptor, _SCAN, at)
        for start in range(0, len(part) - BLOCK + 1, BLOCK):
            block = part[start : start + BLOCK]
            if block[257:262] == b"ustar":
                try:
                    _header(block)
                except ValueError:
                    continue
                return at + start
        at += len(part) // BLOCK * BLOCK or len(part)
    return end
