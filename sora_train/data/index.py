"""The index of a shard: where every sample lies in the tar, and what it is. Parquet beside the shard.

`train-000000.tar` has `train-000000.index.parquet`. A shard without one is indexed on first use. Frames are counted,
not believed; a sample that can't be used stays in the index with its cause, so that it is reported and never planned.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.progress import track

from sora_train.cli import InputError
from sora_train.data.decode import IMAGES, VIDEOS, DecodeError
from sora_train.data.pool import Pool

VERSION = 1
CAPTIONS = ("json", "txt")  # in order of preference
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("extension", pa.string()),  # of the video or image
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("crc32", pa.int64()),
        ("frames", pa.int32()),
        ("fps", pa.float64()),  # 0 for an image
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("duration", pa.float64()),  # seconds
        ("caption_extension", pa.string()),
        ("caption_offset", pa.int64()),
        ("caption_size", pa.int64()),
        ("caption_chars", pa.int32()),
        ("refused", pa.string()),  # cause, or empty
        ("detail", pa.string()),
    ]
)


@dataclass(frozen=True)
class Index:
    """The samples of many shards, one row each, in the order of the shards given."""

    shards: tuple[str, ...]
    shard: np.ndarray  # (n,) which shard a row is in
    first: np.ndarray  # (shards + 1,) rows of shard s are first[s] .. first[s + 1]
    columns: dict[str, np.ndarray]
    fingerprint: str  # changes with any sample's content, order or place

    def __len__(self) -> int:
        return len(self.shard)

    def __getattr__(self, name: str) -> np.ndarray:
        try:
            return self.columns[name]
        except KeyError:
            raise AttributeError(name) from None

    @property
    def usable(self) -> np.ndarray:
        """`(n,)` bool: which rows may be planned."""
        return self.columns["refused"] == ""

    def member(self, row: int) -> tuple[str, str, tuple[int, int, int]]:
        """Path of the shard, extension, and (offset, size, crc32) of a sample's video or image."""
        c = self.columns
        return (
            self.shards[self.shard[row]],
            str(c["extension"][row]),
            (int(c["offset"][row]), int(c["size"][row]), int(c["crc32"][row])),
        )

    def captions(self, row: int) -> tuple[list[str], dict[str, Any]]:
        """The captions of a sample (read from the shard now) and the fields of its json; raises DecodeError."""
        c = self.columns
        with Path(self.shards[self.shard[row]]).open("rb") as file:
            data = os.pread(file.fileno(), int(c["caption_size"][row]), int(c["caption_offset"][row]))
        return parse_captions(data, str(c["caption_extension"][row]))


def expand(patterns: Sequence[str]) -> list[str]:
    """Shard paths of glob patterns (`*`, `?`, `[...]`) and brace ranges (`{000..012}`, `{a,b}`), sorted per pattern.

    Raises InputError for a pattern that names no file, or a file that isn't there.
    """
    from braceexpand import braceexpand  # comes with webdataset

    found: list[str] = []
    for pattern in patterns:
        if pattern.startswith("pipe:"):
            raise InputError(f"shard {pattern!r} is a command; commands in shard names are not run")
        for path in braceexpand(pattern):
            matches = sorted(str(p) for p in _glob(path))
            if not matches:
                raise InputError(f"no shard at {path!r} (from {pattern!r}); check data.sources and data.validation")
            found += matches
    if len(set(found)) != len(found):
        twice = sorted({path for path in found if found.count(path) > 1})
        raise InputError(f"shard {twice[0]!r} is named twice; use `repeat` to see samples more than once")
    return found


def _glob(path: str) -> list[Path]:
    if not any(c in path for c in "*?["):
        return [Path(path)] if Path(path).is_file() else []
    base = Path(path)
    root = Path(base.anchor) if base.is_absolute() else Path()
    return list(root.glob(str(base.relative_to(root) if base.is_absolute() else base)))


def index_path(shard: str) -> Path:
    """Where a shard's index stands."""
    return Path(shard).with_suffix(".index.parquet")


def index_shards(shards: Sequence[str], workers: int | None = None) -> None:
    """Index every shard that has no index, or an older one than itself; each index appears whole or not at all."""
    stale = [shard for shard in shards if not _is_current(shard)]
    if not stale:
        return
    with Pool(workers or os.cpu_count() or 1) as pool:
        for shard in track(stale, description="indexing shards", transient=True):
            table = scan_shard(shard, pool)
            path = index_path(shard)
            temporary = path.with_name(f".{path.name}.{os.getpid()}")
            pq.write_table(table, temporary, compression="zstd")
            temporary.replace(path)


def scan_shard(shard: str, pool: Pool) -> pa.Table:
    """Walk one tar: pair its members to samples, probe every video and image in the pool, check every caption."""
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                if member.isfile():
                    folder, _, name = member.name.rpartition("/")
                    stem, _, extension = name.partition(".")
                    key = f"{folder}/{stem}" if folder else stem
                    samples.setdefault(key, {})[extension.lower()] = member
    except (tarfile.TarError, EOFError) as error:
        raise InputError(f"{shard} is not a readable tar ({error}); rebuild it or take it out of the list") from error
    pending = [(key, members, _start_probe(shard, members, pool)) for key, members in samples.items()]
    rows = [_row(shard, key, members, probed) for key, members, probed in pending]
    size = Path(shard).stat().st_size
    schema = SCHEMA.with_metadata({"sora_train.version": str(VERSION), "sora_train.shard_bytes": str(size)})
    return pa.Table.from_pylist(rows, schema=schema)


def _media(members: dict[str, tarfile.TarInfo]) -> str | None:
    return next((extension for extension in VIDEOS + IMAGES if extension in members), None)


def _start_probe(shard: str, members: dict[str, tarfile.TarInfo], pool: Pool) -> Future[dict[str, Any]] | None:
    extension = _media(members)
    if extension is None:
        return None
    return pool.probe(shard, extension, members[extension].offset_data, members[extension].size)


def _row(
    shard: str, key: str, members: dict[str, tarfile.TarInfo], probed: Future[dict[str, Any]] | None
) -> dict[str, Any]:
    row: dict[str, Any] = {field.name: "" if field.type == pa.string() else 0 for field in SCHEMA}
    row["key"], extension = key, _media(members)
    try:
        if extension is None or probed is None:
            raise DecodeError("no_media", f"members {sorted(members)}, none of them a video or an image")
        media = members[extension]
        row |= {"extension": extension, "offset": media.offset_data, "size": media.size}
        row |= probed.result()
        row["duration"] = row["frames"] / row["fps"] if row["fps"] else 0.0
        text = next((e for e in CAPTIONS if e in members), None)
        if text is None:
            raise DecodeError("no_caption", f"members {sorted(members)}, neither {key}.txt nor {key}.json")
        caption = members[text]
        row |= {"caption_extension": text, "caption_offset": caption.offset_data, "caption_size": caption.size}
        with Path(shard).open("rb") as file:
            captions, _ = parse_captions(os.pread(file.fileno(), caption.size, caption.offset_data), text)
        row["caption_chars"] = max(map(len, captions))
    except DecodeError as error:
        row |= {"refused": error.cause, "detail": error.detail}
    return row


def parse_captions(data: bytes, extension: str) -> tuple[list[str], dict[str, Any]]:
    """Captions of a txt or json member, and the json's fields. Raises DecodeError if there is none to be had."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DecodeError("caption_not_utf8", f"byte {error.start} of the caption is not UTF-8") from error
    if extension == "txt":
        fields: dict[str, Any] = {}
        captions = [text.strip()]
    else:
        try:
            fields = json.loads(text)
            captions = [str(c).strip() for c in fields.get("captions", {"": fields.get("caption", "")}).values()]
        except (ValueError, AttributeError) as error:
            raise DecodeError("caption_json", f"the json holds no caption: {error}") from error
    if not captions or not all(captions):
        raise DecodeError("no_caption", "the caption is empty")
    return captions, fields


def _is_current(shard: str) -> bool:
    path = index_path(shard)
    if not path.is_file():
        return False
    metadata = pq.read_schema(path).metadata or {}
    return (metadata.get(b"sora_train.version"), metadata.get(b"sora_train.shard_bytes")) == (
        str(VERSION).encode(),
        str(Path(shard).stat().st_size).encode(),
    )


def load_index(shards: Sequence[str], allow_empty: bool = False) -> Index:
    """The rows of all shards' indexes. Raises InputError for a shard without one, or if no row is usable (unless
    `allow_empty`)."""
    tables = []
    for shard in shards:
        if not _is_current(shard):
            raise InputError(f"{shard} has no current index; run: python -m data_tools.index {shard}")
        tables.append(pq.read_table(index_path(shard)))
    table = pa.concat_tables(tables)
    columns = {name: table[name].to_numpy() for name in SCHEMA.names}
    counts = [len(t) for t in tables]
    digest = hashlib.sha256()
    for name in ("key", "crc32", "frames", "fps", "width", "height", "refused", "caption_chars"):
        values = columns[name]
        digest.update("\n".join(values).encode() if values.dtype == object else values.tobytes())
    digest.update(json.dumps(counts).encode())
    index = Index(
        tuple(shards),
        np.repeat(np.arange(len(shards)), counts),
        np.concatenate(([0], np.cumsum(counts))).astype(np.int64),
        columns,
        digest.hexdigest(),
    )
    if not allow_empty and not index.usable.any():
        causes = sorted(set(columns["refused"])) or ["no samples"]
        raise InputError(f"no usable sample in {len(shards)} shard(s) such as {shards[0]}: {', '.join(causes)}")
    return index
