"""One shard to the rows of its index: walk the tar, pair members to samples, count frames, check captions."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa

from sora_train.config.schema import Probe
from sora_train.data.index.captions import MAX_CAPTION_BYTES, columns_of, has_captions, parse_captions, parse_fields
from sora_train.data.index.tar import Fault, Member, walk
from sora_train.data.read.decode import IMAGES, VIDEOS, DecodeError
from sora_train.data.read.encoded import LATENT
from sora_train.data.read.encoded import probe as probe_latents
from sora_train.data.read.pool import Pool, Probed

META = "meta."  # prefix of the columns that come from the json
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("extension", pa.string()),  # of the video or image
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("crc32", pa.int64()),
        ("frames", pa.int32()),  # shown ones
        ("fps", pa.float64()),  # 0 for an image; the average where the rate varies
        ("width", pa.int32()),  # as shown: upright, pixels square
        ("height", pa.int32()),
        ("duration", pa.float64()),  # seconds, from presentation times
        ("vfr", pa.bool_()),  # variable frame rate
        ("careful", pa.bool_()),  # decord would count wrongly or show it wrongly; PyAV reads it
        ("sequential", pa.bool_()),  # frames can't be asked for alone: decoded from the start and counted
        ("stream", pa.int16()),  # which of the file's
        ("rotation", pa.int16()),  # degrees that the pictures are turned to stand upright, counter-clockwise
        ("mirrored", pa.bool_()),  # left to right, before that
        ("pixel_aspect", pa.float64()),  # width of a stored pixel over its height; width and height allow for it
        ("interlaced", pa.bool_()),
        ("transfer", pa.string()),  # of HDR: pq or hlg; empty: SDR
        ("codec", pa.string()),
        ("pixel_format", pa.string()),
        ("caption_extension", pa.string()),
        ("caption_offset", pa.int64()),
        ("caption_size", pa.int64()),
        ("caption_crc32", pa.int64()),
        ("caption_chars", pa.int32()),  # of the longest
        ("caption_lengths", pa.list_(pa.int32())),  # of each, in the order of the json
        ("encoded", pa.string()),  # what latents were made with; empty for pixels
        ("more", pa.string()),  # further members as JSON: extension -> [offset, size, crc32]; empty if none
        ("refused", pa.string()),  # cause, or empty
        ("detail", pa.string()),
    ]
)
_MARKS = 16  # member headers that tell whether a shard is still the same
_PIECE = 8 << 20
_TOGETHER, _TOGETHER_BYTES = 32, 64 << 20  # members that are probed by one message
Members = dict[str, Member]  # of one sample, by extension
Place = tuple[Future[list[Probed]], int]  # of a sample among those that are probed together


class Scan(NamedTuple):
    """A shard's rows of the index, where some of its headers are, and why fields of its jsons became no column."""

    table: pa.Table
    headers: list[int]
    ignored: dict[str, str]


def scan_shard(
    path: str, pool: Pool, depth: Probe = Probe.all, advance: Callable[[int], None] = lambda count: None
) -> Scan:
    """Read one shard, and decode its media to the extent of `depth`. Faults of the tar become rows without a key."""
    samples, faults, headers = members_of(path)
    probed = dict(_start_probes(path, {key: members for key, (members, _) in samples.items()}, pool, depth))
    rows, fields = [], []
    with Path(path).open("rb") as file:
        for key, (members, double) in samples.items():
            row, found = _row(file, key, members, double, probed.get(key))
            rows.append(row)
            fields.append(found)
            advance(sum(member.size for member in members.values()))
    for fault in faults:
        rows.append(_empty() | {"refused": f"tar_{fault.cause}", "detail": fault.detail, "offset": fault.offset})
        fields.append({})
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    columns, ignored = columns_of(fields)
    for name, values in columns.items():
        table = table.append_column(META + name, values)
    step = max(1, len(headers) // _MARKS)
    return Scan(table, headers[::step][:_MARKS], ignored)


def members_of(path: str) -> tuple[dict[str, tuple[Members, list[str]]], list[Fault], list[int]]:
    """Read the members of a tar.

    Returns:
        The members of each sample and its duplicate extensions, by key; the faults; the positions of all headers.
    """
    samples: dict[str, tuple[Members, list[str]]] = {}
    faults, headers = [], []
    with Path(path).open("rb") as file:
        for found in walk(file):
            if isinstance(found, Fault):
                faults.append(found)
                continue
            headers.append(found.header)
            folder, _, name = found.name.rpartition("/")
            stem, _, extension = name.partition(".")
            members, double = samples.setdefault(f"{folder}/{stem}" if folder else stem, ({}, []))
            if extension.lower() in members:
                double.append(extension.lower())
            members.setdefault(extension.lower(), found)
    return samples, faults, headers


def _media(members: Members) -> str | None:
    return next((extension for extension in (LATENT, *VIDEOS, *IMAGES) if extension in members), None)


def _start_probes(path: str, samples: dict[str, Members], pool: Pool, depth: Probe) -> Iterator[tuple[str, Place]]:
    """Have all media of a shard probed that may be: where each sample's figures will be."""
    media = ((key, _media(members), members) for key, members in samples.items())
    wanted = [(key, (path, e, m[e].offset, m[e].size)) for key, e, m in media if e is not None and e != LATENT]
    wanted = [entry for entry in wanted if entry[1][3] <= pool.limits.bytes]
    first, total = 0, 0
    for number, (_, member) in enumerate(wanted):
        total += member[3]
        last = number + 1 == len(wanted) or total + wanted[number + 1][1][3] > _TOGETHER_BYTES
        if last or depth is Probe.all or number + 1 - first == _TOGETHER:
            together = wanted[first : number + 1]
            future = pool.probe_all(
                [member for _, member in together], depth is not Probe.packets, whole=depth is Probe.all
            )
            yield from ((key, (future, place)) for place, (key, _) in enumerate(together))
            first, total = number + 1, 0


def _empty() -> dict[str, Any]:
    kinds = {pa.string(): "", pa.bool_(): False}
    return {f.name: [] if pa.types.is_list(f.type) else kinds.get(f.type, 0) for f in SCHEMA}


def _row(
    file: BinaryIO, key: str, members: Members, double: list[str], probed: Place | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """One row of the index, and the plain fields of the sample's json."""
    row, extension = _empty() | {"key": key}, _media(members)
    fields: dict[str, Any] = {}
    try:
        if extension is None:
            raise DecodeError("no_media", f"members {sorted(members)[:8]}, none of them a video or an image")
        media = members[extension]
        row |= {"extension": extension, "offset": media.offset, "size": media.size}
        if double:
            raise DecodeError("duplicate", f"{key}.{double[0]} is in the shard {double.count(double[0]) + 1} times")
        if extension == LATENT:
            start = os.pread(file.fileno(), min(media.size, _PIECE), media.offset)
            row |= {**probe_latents(start, media.size), "crc32": _crc32(file, media)}
        elif probed is None:
            raise DecodeError("bytes", f"{media.size} bytes, more than data.limits.bytes")
        else:
            future, place = probed
            figures = future.result()[place]
            if isinstance(figures, DecodeError):
                raise figures
            row |= figures
        fields = parse_fields(_text(file, members["json"])) if "json" in members else {}
        text = _caption_extension(key, members, fields)
        caption = members[text]
        row |= {"caption_extension": text, "caption_offset": caption.offset, "caption_size": caption.size}
        data = _text(file, caption)
        lengths = [len(c) for c in parse_captions(data, text)[0]]
        row |= {"caption_crc32": zlib.crc32(data), "caption_chars": max(lengths), "caption_lengths": lengths}
        rest = {e: m for e, m in members.items() if e not in (extension, text)}
        if rest:
            row["more"] = json.dumps({e: [m.offset, m.size, _crc32(file, m)] for e, m in rest.items()})
    except DecodeError as error:
        row |= {"refused": error.cause, "detail": error.detail}
    return row, fields


def _caption_extension(key: str, members: Members, fields: dict[str, Any]) -> str:
    """Extension of the member with a sample's captions; a json without captions is skipped in favour of the txt.

    Raises DecodeError if neither has a caption.
    """
    if has_captions(fields):
        return "json"
    if "txt" in members:
        return "txt"
    if "json" in members:
        named = f"{key}.json has neither caption nor captions (it has {', '.join(sorted(fields)[:8]) or 'no field'})"
        raise DecodeError("no_caption", ascii(f"{named}, and there is no {key}.txt")[1:-1])
    raise DecodeError("no_caption", f"members {sorted(members)[:8]}, neither {key}.txt nor {key}.json")


def _text(file: BinaryIO, member: Member) -> bytes:
    return os.pread(file.fileno(), min(member.size, MAX_CAPTION_BYTES + 1), member.offset)


def _crc32(file: BinaryIO, member: Member) -> int:
    value = 0
    for at in range(member.offset, member.offset + member.size, _PIECE):
        value = zlib.crc32(os.pread(file.fileno(), min(_PIECE, member.offset + member.size - at), at), value)
    return value
