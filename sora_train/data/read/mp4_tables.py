"""Frame times of an mp4 file, read from its sample tables as arrays.

FFmpeg gives the same times packet by packet, at thirty times the cost. Only for unambiguous files: one video track, no
fragments, at most one edit that hides nothing, consistent tables, and samples that all lie inside the file (ISO/IEC
14496-12:2022, 8.2 to 8.7). For all others FFmpeg is used.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np

_LARGE = 1 << 30  # ticks; larger steps of time are broken, or negative
_GROUPS = (b"sbgp", b"sgpd", b"stz2", b"stsh")  # boxes of a sample table that say more of it than is read here


class Times(NamedTuple):
    """Frames of a video in the order of the file."""

    ticks: np.ndarray  # (n,) when each is shown, up to a constant
    is_key: np.ndarray  # (n,) bool
    places: np.ndarray  # (n,) where each begins in the file
    sizes: np.ndarray  # (n,) bytes
    scale: int  # ticks a second


class _UnclearError(Exception):
    """The file is not of the plain kind."""


def frame_times(data: bytes, most: int) -> Times | None:
    """Times of the frames of a plain mp4 or mov with at most `most` of them; None for every other file."""
    try:
        return _frame_times(memoryview(data), most)
    except (_UnclearError, ValueError, struct.error, KeyError, IndexError):
        return None


def _frame_times(data: memoryview, most: int) -> Times:
    top = _boxes(data)
    if b"moof" in top or len(top[b"moov"]) != 1:
        raise _UnclearError
    movie = _boxes(top[b"moov"][0])
    tracks = [_boxes(track) for track in movie[b"trak"]]
    videos = [track for track in tracks if _boxes(_one(track, b"mdia"))[b"hdlr"][0][8:12] == b"vide"]
    if b"mvex" in movie or len(videos) != 1:
        raise _UnclearError
    media = _boxes(_one(videos[0], b"mdia"))
    table = _boxes(_one(_boxes(_one(media, b"minf")), b"stbl"))
    if any(name in table for name in _GROUPS):
        raise _UnclearError
    sizes = _sizes(_one(table, b"stsz"), most)
    places = _places(table, sizes, len(data))
    ticks = np.concatenate(([0], np.cumsum(_runs(_one(table, b"stts"), len(sizes), signed=False))[:-1]))
    if b"ctts" in table:
        ticks = ticks + _runs(_one(table, b"ctts"), len(sizes), signed=True)
    is_key = np.ones(len(sizes), dtype=bool)
    if b"stss" in table:
        keys = _numbers(_one(table, b"stss"), 1)[:, 0]
        if not len(keys) or keys.min() < 1 or keys.max() > len(sizes):
            raise _UnclearError
        is_key[:] = False
        is_key[keys - 1] = True
    scale = _scale(_one(media, b"mdhd"))
    _check_edits(videos[0], ticks, scale, _scale(_one(movie, b"mvhd")))
    return Times(ticks, is_key, places, sizes, scale)


def _boxes(data: memoryview) -> dict[bytes, list[memoryview]]:
    """The boxes that follow one another, by name, without their heads."""
    found: dict[bytes, list[memoryview]] = {}
    at = 0
    while at + 8 <= len(data):
        size, name, head = *struct.unpack_from(">I4s", data, at), 8
        if size == 1:
            size, head = struct.unpack_from(">Q", data, at + 8)[0], 16
        elif size == 0:
            size = len(data) - at
        if size < head or at + size > len(data):
            raise _UnclearError
        found.setdefault(name, []).append(data[at + head : at + size])
        at += size
    return found


def _one(boxes: dict[bytes, list[memoryview]], name: bytes) -> memoryview:
    if len(boxes[name]) != 1:
        raise _UnclearError
    return boxes[name][0]


def _numbers(box: memoryview, columns: int, kind: str = ">u4", before: int = 4) -> np.ndarray:
    """Read the table of a box, `(entries, columns)`; the number of entries is `before` bytes into it."""
    count = struct.unpack_from(">I", box, before)[0]
    first, width = before + 4, np.dtype(kind).itemsize * columns
    if len(box) != first + count * width:
        raise _UnclearError
    return np.frombuffer(box, kind, count * columns, first).reshape(count, columns).astype(np.int64)


def _sizes(box: memoryview, most: int) -> np.ndarray:
    """Bytes of each sample."""
    same, count = struct.unpack_from(">II", box, 4)
    if not 0 < count <= most:
        raise _UnclearError
    sizes = np.full(count, same, dtype=np.int64) if same else _numbers(box, 1, before=8)[:, 0]
    if sizes.min() == 0:
        raise _UnclearError
    return sizes


def _runs(box: memoryview, count: int, signed: bool) -> np.ndarray:
    """One value a sample, from runs of equal ones."""
    runs = _numbers(box, 2)
    lengths, values = runs[:, 0], runs[:, 1]
    if signed:
        values = values.astype(np.uint32).astype(np.int32).astype(np.int64)
    elif values[:-1].size and values[:-1].min() < 1:
        raise _UnclearError
    if lengths.sum() != count or np.abs(values).max() >= _LARGE or (not signed and count > 1 and values[0] < 1):
        raise _UnclearError
    return np.repeat(values, lengths)


def _places(table: dict[bytes, list[memoryview]], sizes: np.ndarray, end: int) -> np.ndarray:
    """Offset of each sample; all samples are inside the file."""
    wide = b"co64" in table
    chunks = _numbers(_one(table, b"co64" if wide else b"stco"), 1, ">u8" if wide else ">u4")[:, 0]
    runs = _numbers(_one(table, b"stsc"), 3)
    first, each = runs[:, 0], runs[:, 1]
    if first[0] != 1 or (np.diff(first) < 1).any() or first[-1] > len(chunks) or (runs[:, 2] != runs[0, 2]).any():
        raise _UnclearError
    lengths = np.diff(first, append=len(chunks) + 1)
    if int((each * lengths).sum()) != len(sizes):
        raise _UnclearError
    ends = np.concatenate(([0], np.cumsum(sizes)))
    borders = np.concatenate(([0], np.cumsum(np.repeat(each, lengths))))
    if chunks.min() < 0 or (chunks + np.diff(ends[borders])).max() > end:
        raise _UnclearError
    return ends[:-1] + np.repeat(chunks - ends[borders[:-1]], np.diff(borders))


def _scale(box: memoryview) -> int:
    """Ticks a second of a movie's or a track's header."""
    scale = struct.unpack_from(">I", box, 20 if box[0] == 1 else 12)[0]
    if box[0] > 1 or not 0 < scale < _LARGE:
        raise _UnclearError
    return int(scale)


def _check_edits(track: dict[bytes, list[memoryview]], ticks: np.ndarray, scale: int, movie_scale: int) -> None:
    """No edit hides a frame, or shows one twice, or at another rate."""
    if b"edts" not in track:
        return
    box = _one(_boxes(_one(track, b"edts")), b"elst")
    count = struct.unpack_from(">I", box, 4)[0]
    length, first, rate = struct.unpack_from(">QqI" if box[0] == 1 else ">IiI", box, 8)
    last = first + length * scale / movie_scale if length else float("inf")
    if count != 1 or box[0] > 1 or rate != 1 << 16 or not 0 <= first <= ticks.min() or last <= ticks.max():
        raise _UnclearError
