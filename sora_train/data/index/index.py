"""Index of shards: the offset and the facts of every sample. A Parquet file beside each shard, read into NumPy columns.

`train-000000.tar` has `train-000000.index.parquet`. A shard without one is indexed on first use (`make.py`). Frames are
counted rather than taken from the container. A sample that can't be used stays in the index with its cause: it is
reported and never planned. Numbers and words in a sample's json become columns for filters.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sora_train.core.cli import InputError
from sora_train.data.index.captions import parse_captions, parse_fields
from sora_train.data.index.files import REQUESTS, adopt, is_current
from sora_train.data.index.places import index_path
from sora_train.data.index.scan import META
from sora_train.data.read.decode import DecodeError, Track
from sora_train.data.read.store import Store

_HASHED = (
    "key", "crc32", "frames", "fps", "width", "height", "vfr", "careful", "sequential", "stream", "rotation",
    "mirrored", "refused", "caption_crc32",
)  # fmt: skip


@dataclass(frozen=True)
class Index:
    """The samples of many shards, one row each, in the order of the shards given."""

    shards: tuple[str, ...]
    shard: np.ndarray  # (n,) which shard a row is in
    first: np.ndarray  # (shards + 1,) rows of shard s are first[s] .. first[s + 1]
    columns: dict[str, np.ndarray]
    fingerprint: str  # changes with any sample's content, order or place
    store: Store = field(default_factory=Store)  # what captions are read through
    captioned: bool = True  # captions are wanted: a sample without one can't be used

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
        return self.columns["refused"] == "" if self.captioned else self.columns["frames"] > 0

    def member(self, row: int) -> tuple[str, str, tuple[int, int, int]]:
        """Path of the shard, extension, and (offset, size, crc32) of a sample's video or image."""
        c = self.columns
        return (
            self.shards[self.shard[row]],
            str(c["extension"][row]),
            (int(c["offset"][row]), int(c["size"][row]), int(c["crc32"][row])),
        )

    def refusal(self, row: int) -> DecodeError:
        """Why a row isn't usable."""
        return DecodeError(str(self.columns["refused"][row]), str(self.columns["detail"][row]))

    def track(self, row: int) -> Track:
        """Track of a video: the facts that a decoder needs."""
        return Track.of({name: self.columns[name][row] for name in Track._fields})

    def captions(self, row: int) -> tuple[list[str], dict[str, Any]]:
        """The captions of a sample (read from the shard now) and the fields of its json; raises DecodeError."""
        c, shard = self.columns, self.shards[self.shard[row]]
        place = int(c["caption_offset"][row]), int(c["caption_size"][row])
        data = self.read(shard, place, int(c["caption_crc32"][row]), "caption")
        return parse_captions(data, str(c["caption_extension"][row]))

    def fields(self, row: int) -> dict[str, Any]:
        """The fields of a sample's json, where its captions are in the txt too; raises DecodeError."""
        place = self.further(row).get("json")
        if place is None:
            return self.captions(row)[1]
        return parse_fields(self.read(self.shards[self.shard[row]], place[:2], place[2], "json"))

    def further(self, row: int) -> dict[str, tuple[int, int, int]]:
        """The other members of a sample by extension: offset, size, crc32."""
        text = str(self.columns["more"][row])
        return {extension: tuple(place) for extension, place in json.loads(text).items()} if text else {}

    def encoded(self) -> set[str]:
        """Settings with which each sample was encoded (see `encoded.py`); empty for samples of pixels."""
        return set(self.columns["encoded"][self.usable].tolist()) if "encoded" in self.columns else {""}

    def read(self, shard: str, place: tuple[int, int], crc32: int, what: str) -> bytes:
        """The bytes at (offset, size) of a shard; raises DecodeError if they aren't those that were indexed."""
        data = self.store.read(shard, *place)
        if zlib.crc32(data) != crc32:
            self.store.forget(shard, *place)  # the copy in the cache may be at fault
            data = self.store.read(shard, *place)
            if zlib.crc32(data) != crc32:
                raise DecodeError("checksum", f"the {what} at {place[0]} is not the one that was indexed")
        return data


def load_index(
    shards: Sequence[str], store: Store | None = None, max_bad_fraction: float = 1.0, allow_empty: bool = False,
    captioned: bool = True,
) -> Index:  # fmt: skip
    """The rows of all shards' indexes. Without `captioned`, samples that lack nothing but a caption can be used too.

    Raises InputError for a shard without one, if no row is usable (unless `allow_empty`), or if a larger share than
    `max_bad_fraction` isn't.
    """
    store = store or Store()
    with ThreadPoolExecutor(REQUESTS) as threads:
        tables = list(threads.map(lambda shard: load_rows(shard, store), shards))
    table = pa.concat_tables(_of_one_kind(tables), promote_options="permissive")
    columns = {name: _column(table[name]) for name in table.column_names}
    columns |= _filterable(columns)
    counts = [len(t) for t in tables]
    digest = hashlib.sha256()
    for name in (*_HASHED, *sorted(name for name in columns if name.startswith(META))):
        values = columns[name]
        digest.update("\n".join(values).encode() if values.dtype == object else values.tobytes())
    digest.update(json.dumps(counts).encode())
    index = Index(
        tuple(shards),
        np.repeat(np.arange(len(shards)), counts),
        np.concatenate(([0], np.cumsum(counts))).astype(np.int64),
        columns,
        digest.hexdigest(),
        store,
        captioned,
    )
    if not allow_empty:
        _check_share(index, max_bad_fraction)
    return index


def load_rows(shard: str, store: Store) -> pa.Table:
    """Load the index of one shard, or the copy beside a remote shard. Raises InputError if none is current."""
    if not is_current(shard, store) and not adopt(shard, store, None, None):
        raise InputError(f"{shard} has no current index; run: python -m data_tools.index {shard}")
    return pq.read_table(index_path(shard, store))


def _of_one_kind(tables: list[pa.Table]) -> list[pa.Table]:
    """The tables, with columns from jsons as words wherever a shard has words there."""
    words = {f.name for t in tables for f in t.schema if f.name.startswith(META) and f.type == pa.string()}
    for number, table in enumerate(tables):
        for name in words & {f.name for f in table.schema if f.type == pa.float64()}:
            place = table.schema.get_field_index(name)
            values = table[name]
            words_of = pc.if_else(pc.is_nan(values), None, values).cast(pa.string())
            table = table.set_column(place, name, words_of)
        tables[number] = table
    return tables


def _column(values: pa.ChunkedArray) -> np.ndarray:
    """A column as numpy: missing numbers become NaN, missing words empty."""
    if pa.types.is_string(values.type):
        return values.fill_null("").to_numpy()
    return values.to_numpy()


def _filterable(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The columns from jsons under names that a filter can spell: NAME, or meta_NAME where NAME is one of ours."""
    found = {}
    for name, values in columns.items():
        if name.startswith(META):
            plain = name.removeprefix(META)
            found[plain if plain not in columns else META.replace(".", "_") + plain] = values
    return found


def _check_share(index: Index, max_bad_fraction: float) -> None:
    causes = Counter(index.columns["refused"][~index.usable].tolist())
    usable = int(index.usable.sum())
    named = ", ".join(f"{cause} {count}" for cause, count in causes.most_common(3)) or "no samples"
    if not usable:
        first = next((str(d) for d in index.columns["detail"] if d), "")
        where = f"{len(index.shards)} shard(s) such as {index.shards[0]}"
        raise InputError(f"no usable sample in {where}: {named}; {first}")
    if causes.total() > max_bad_fraction * len(index) and len(index) >= 100:
        raise InputError(
            f"{causes.total()} of {len(index)} samples can't be used: {named} (data.max_bad_fraction is "
            f"{max_bad_fraction}); python -m data_tools.lint {index.shards[0]} names each"
        )
