"""Side tables: further columns of samples, by key, in Parquet files beside the index.

A table has a column `key` and any others; numbers and text of them become columns for filters and weights, so that a
score can be added without rewriting a shard. Where shards share keys, a column `shard` (file name of the tar, with or
without its ending) tells them apart. The tables' bytes are hashed into the index's fingerprint, and so into the plan.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sora_train.core.cli import InputError
from sora_train.data.index.index import Index
from sora_train.data.index.patterns import expand
from sora_train.data.read.decode import DecodeError
from sora_train.data.read.store import Store

_PIECE = re.compile(r"\+\d+$")  # of the key of a clip that was encoded before: which clip of its video
_UNUSED = -1


class Lacking(NamedTuple):
    """Samples that could be used, for which a side table has no row."""

    table: str  # as configured
    samples: int
    key: str  # of the first
    shard: str

    def error(self) -> InputError:
        """Error to raise in a run that needs the missing rows."""
        return InputError(
            f"data.side_tables={self.table} has no row for {self.samples} sample(s) such as {self.key!r} of "
            f"{self.shard}; add them (null where there is no value), or leave the shard out"
        )


@dataclass(frozen=True)
class _Table:
    name: str  # as configured
    keys: pa.Array  # `key`, or `shard/key`
    by_shard: bool
    columns: dict[str, pa.ChunkedArray]

    def rows(self, index: Index, first_shard: int, claimed: np.ndarray) -> np.ndarray:
        """The table's row of each row of an index, -1 where there is none.

        Raises InputError where a usable sample has none, or where two shards have one key.
        """
        rows = self._places(index)
        if lacking := self.lacking(index, rows):
            raise lacking.error()
        shards = np.asarray(index.shard)
        found = np.flatnonzero(rows >= 0)
        mine, before = shards[found] + first_shard, claimed[rows[found]]
        claimed[rows[found]] = mine
        twice = np.flatnonzero(((before != _UNUSED) & (before != mine)) | (claimed[rows[found]] != mine))
        if len(twice):
            raise InputError(
                f"data.side_tables={self.name}: key {str(index.columns['key'][found[twice[0]]])!r} is in several "
                "shards; add a column `shard` with the file name of each sample's tar"
            )
        return rows

    def lacking(self, index: Index, rows: np.ndarray | None = None) -> Lacking | None:
        """The usable samples of an index that have no row here; `rows` are the rows of all, where they are known."""
        rows = self._places(index) if rows is None else rows
        missing = np.flatnonzero(index.usable & (rows < 0))
        if not len(missing):
            return None
        shard = index.shards[int(np.asarray(index.shard)[missing[0]])]
        return Lacking(self.name, len(missing), str(index.columns["key"][missing[0]]), shard)

    def _places(self, index: Index) -> np.ndarray:
        keys = index.columns["key"]
        if "encoded" in index.columns and (encoded := index.columns["encoded"] != "").any():
            keys = np.where(encoded, [_PIECE.sub("", key) for key in keys.tolist()], keys)
        if self.by_shard:
            names = np.array([_stem(shard) for shard in index.shards], dtype=object)
            keys = names[np.asarray(index.shard)] + "/" + keys
        return pc.fill_null(pc.index_in(pa.array(keys, pa.string()), self.keys), -1).to_numpy(zero_copy_only=False)


class SideTables:
    """The tables of a run, read once.

    Args:
        patterns: One table each: a path, glob, brace range or URL; its files are parts of it.
        store: Reads remote files.

    Raises InputError for a file that isn't there or is no such table, a key that comes twice, or a column that two
    tables have.
    """

    def __init__(self, patterns: Sequence[str], store: Store) -> None:
        self.hashes: list[str] = []
        self._tables: list[_Table] = []
        for pattern in patterns:
            parts = []
            for file in _files(pattern, store):
                with _local(file, store) as path:
                    self.hashes.append(_hash(path))
                    parts.append((file, _read(file, path)))
            table = _table(pattern, parts)
            for other in self._tables:
                _refuse_shared(table, other.columns, f"data.side_tables={other.name}")
            self._tables.append(table)

    def join(self, index: Index, asked: Collection[str] | None = None) -> Index:
        """The index with the tables' columns, and a fingerprint that changes with any byte of the tables.

        With `asked`, returns the index unchanged if it already has these columns. Raises InputError as `values` does.
        """
        if not self._tables or (asked is not None and set(asked) <= set(index.columns)):
            return index
        columns = index.columns | self.values(index, 0, self.claims())
        text = json.dumps([index.fingerprint, *sorted(self.hashes)])
        return replace(index, columns=columns, fingerprint=sha256(text.encode()).hexdigest())

    @property
    def numbers(self) -> list[str]:
        """Names of the columns that hold numbers, sorted."""
        return sorted(n for t in self._tables for n, column in t.columns.items() if not pa.types.is_string(column.type))

    def lacking(self, index: Index) -> list[Lacking]:
        """Rows that the tables lack for usable samples of an index, by table."""
        return [found for table in self._tables if (found := table.lacking(index))]

    def claims(self) -> list[np.ndarray]:
        """Number of the shard that uses each row of each table, -1 for none yet; no two shards may use one row."""
        return [np.full(len(table.keys), _UNUSED, dtype=np.int32) for table in self._tables]

    def values(self, index: Index, first_shard: int, claims: list[np.ndarray]) -> dict[str, np.ndarray]:
        """Columns of all tables, in the order of the samples of an index.

        Numbers are float64, NaN where there is none; text is empty there.

        Args:
            index: Index of some of a run's shards.
            first_shard: Number of the first of them among the run's shards.
            claims: Result of `claims`; the rows used here are noted in it.

        Raises:
            InputError: A usable sample has no row, or the index has a column of the same name.
        """
        found: dict[str, np.ndarray] = {}
        for table, claimed in zip(self._tables, claims, strict=True):
            _refuse_shared(table, {*index.columns, "usable"}, "the index")
            rows = table.rows(index, first_shard, claimed)
            places = pa.array(rows, mask=rows < 0)
            for name, column in table.columns.items():
                values = column.take(places)
                is_text = pa.types.is_string(values.type)
                found[name] = (values.fill_null("") if is_text else values.cast(pa.float64())).to_numpy()
        return found


def side_table_hashes(patterns: Sequence[str], store: Store) -> list[str]:
    """The hashes of all files of side tables, sorted. The contents are not parsed."""
    hashes = []
    for file in (file for pattern in patterns for file in _files(pattern, store)):
        with _local(file, store) as path:
            hashes.append(_hash(path))
    return sorted(hashes)


def _files(pattern: str, store: Store) -> list[str]:
    return expand([pattern], store, "side table", "data.side_tables")


@contextmanager
def _local(file: str, store: Store) -> Iterator[Path]:
    try:
        with store.local(file) as path:
            yield path
    except (OSError, DecodeError) as error:
        raise InputError(f"data.side_tables: {file} can't be read: {error}") from error


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def _read(file: str, path: Path) -> pa.Table:
    """Read the numeric and text columns of one file. Raises InputError if it is no side table."""
    try:
        schema = pq.read_schema(path)
        if "key" not in schema.names:
            raise InputError(f"data.side_tables: {file} has no column `key`; it has {', '.join(schema.names[:8])}")
        kept = [field.name for field in schema if _is_text(field.type) or _is_number(field.type)]
        table = pq.read_table(path, columns=list(dict.fromkeys(kept)))
    except pa.ArrowException as error:
        raise InputError(f"data.side_tables: {file} is no Parquet file: {str(error).splitlines()[0]}") from error
    for name in ("key", "shard"):
        if name in schema.names and not _is_text(schema.field(name).type):
            kind = schema.field(name).type
            raise InputError(f"data.side_tables: column `{name}` of {file} is {kind}; keys are text, as in the shards")
    fields = [(f.name, pa.string() if _is_text(f.type) else pa.float64()) for f in table.schema]
    return pa.table([table[name].cast(kind) for name, kind in fields], schema=pa.schema(fields))


def _table(pattern: str, parts: Sequence[tuple[str, pa.Table]]) -> _Table:
    """One table from its files; raises InputError where they differ in their columns, or a key comes twice."""
    first_file, first = parts[0]
    for file, part in parts:
        if set(part.schema) != set(first.schema):
            raise InputError(
                f"data.side_tables={pattern}: {file} and {first_file} have other columns; name them one by one"
            )
    table = pa.concat_tables([part.select(first.column_names) for _, part in parts]).combine_chunks()
    keys: Any = table["key"].combine_chunks()
    by_shard = "shard" in table.column_names
    if by_shard:
        names = pc.replace_substring_regex(table["shard"].combine_chunks(), r"^.*/|\.tar$", "")
        keys = pc.binary_join_element_wise(names, keys, "/")
    if keys.null_count:
        raise InputError(f"data.side_tables={pattern}: {keys.null_count} row(s) have no key")
    if len(keys) != len(pc.unique(keys)):
        counts = pc.value_counts(keys)
        double = next(str(pair["values"]) for pair in counts if pair["counts"].as_py() > 1)
        raise InputError(f"data.side_tables={pattern}: key {double!r} has several rows; keep one of them")
    columns = {name: table[name] for name in table.column_names if name not in ("key", "shard") and name.isidentifier()}
    return _Table(pattern, keys, by_shard, columns)


def _refuse_shared(table: _Table, others: Any, where: str) -> None:
    if shared := sorted(set(table.columns) & set(others)):
        raise InputError(f"data.side_tables={table.name}: column {shared[0]!r} is in {where} too; rename it")


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_number(kind: pa.DataType) -> bool:
    tests = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_decimal)
    return any(test(kind) for test in tests)


def _stem(shard: str) -> str:
    return re.sub(r"^.*/|\.tar$", "", shard)
