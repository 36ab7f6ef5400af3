"""Consolidated index of many shards: one memory-mapped file per column that plans and filters need.

It takes 19 bytes a sample, and 8 bytes for each number of its side tables. The ranks of a node map the same pages,
which are read on first use, so that a hundred million samples open in a moment. The offsets of samples in their shards
remain in the Parquet file beside each shard, which is read when one of its samples is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sora_train.core.cli import InputError
from sora_train.data.index.index import Index, load_index
from sora_train.data.index.side_tables import Lacking, SideTables, side_table_hashes
from sora_train.data.read.decode import DecodeError, Track
from sora_train.data.read.store import Store

VERSION = 3
COLUMNS = {  # 19 bytes
    "usable": np.uint8, "frames": np.int32, "fps": np.float32, "width": np.uint16, "height": np.uint16,
    "duration": np.float32, "caption_chars": np.uint16,
}  # fmt: skip
_LOOKED_AT = 16  # shards whose samples' encoding is compared at the start
_OPEN_SHARDS = 256  # whose Parquet is kept in memory


class Beside(NamedTuple):
    """Side tables within a consolidated index: names of columns, the hash of each file, and rows that they lack."""

    columns: tuple[str, ...] = ()
    hashes: tuple[str, ...] = ()
    lacking: tuple[Lacking, ...] = ()  # for samples that only a method which reads no captions can use


_ALONE = Beside()


class _ByRow:
    """Sequence that looks like a column, made for one row at a time."""

    def __init__(self, length: int, of_row: Callable[[int], Any]) -> None:
        self._length, self._of_row = length, of_row

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, row: int) -> Any:
        return self._of_row(int(row))


class Consolidated(Index):
    """An `Index` whose planned columns are mapped; everything else about a row comes from its shard's own index."""

    def __init__(
        self,
        shards: Sequence[str],
        first: np.ndarray,
        columns: dict[str, np.ndarray],
        prints: Sequence[str],
        fingerprint: str,
        store: Store,
        *,
        captioned: bool = True,
    ) -> None:
        count = int(first[-1])
        by_row: Any = _ByRow(count, lambda row: int(np.searchsorted(first, row, side="right")) - 1)
        super().__init__(tuple(shards), by_row, first, columns, fingerprint, store, captioned)
        object.__setattr__(self, "key", _ByRow(count, lambda row: self._at(row)[0].key[self._at(row)[1]]))

        def load(shard: int) -> Index:
            index = load_index([shards[shard]], store, allow_empty=True, captioned=captioned)
            if index.fingerprint[:16] != prints[shard]:
                raise InputError(f"{shards[shard]} changed after it was consolidated; consolidate the index again")
            return index

        object.__setattr__(self, "_load", lru_cache(_OPEN_SHARDS)(load))

    @property
    def usable(self) -> np.ndarray:
        """`(n,)` bool: which rows may be planned."""
        return self.columns["usable"].view(np.bool_) if self.captioned else self.columns["frames"] > 0

    def _at(self, row: int) -> tuple[Index, int]:
        shard = self.shard[row]
        return self._load(shard), row - int(self.first[shard])  # type: ignore[operator]

    def member(self, row: int) -> tuple[str, str, tuple[int, int, int]]:
        """Shard, extension and place of a video or image; see `Index.member`."""
        index, at = self._at(row)
        return index.member(at)

    def refusal(self, row: int) -> DecodeError:
        """Reason why the index refuses a sample; see `Index.refusal`."""
        index, at = self._at(row)
        return index.refusal(at)

    def track(self, row: int) -> Track:
        """Video track of a sample; see `Index.track`."""
        index, at = self._at(row)
        return index.track(at)

    def captions(self, row: int) -> tuple[list[str], dict[str, Any]]:
        """Captions and fields of a sample; see `Index.captions`."""
        index, at = self._at(row)
        return index.captions(at)

    def further(self, row: int) -> dict[str, tuple[int, int, int]]:
        """Places of the further members of a sample; see `Index.further`."""
        index, at = self._at(row)
        return index.further(at)

    def encoded(self) -> set[str]:
        """Settings that latents were made with, of sixteen shards spread over all; see `Index.encoded`."""
        some = np.unique(np.linspace(0, len(self.shards) - 1, _LOOKED_AT).astype(int))
        return set().union(*(self._load(int(shard)).encoded() for shard in some))  # type: ignore[operator]


def consolidate(
    shards: Sequence[str],
    folder: str | Path,
    advance: Callable[[int], None] = lambda done: None,
    store: Store | None = None,
    side_tables: Sequence[str] = (),
) -> int:
    """Write the consolidated index of shards that have their own; returns the number of samples.

    The numeric columns of the side tables are added. `meta.json` is written last: a folder without it is not an index.
    """
    folder, store = Path(folder), store or Store()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "meta.json").unlink(missing_ok=True)
    tables = SideTables(side_tables, store)
    claims, names = tables.claims(), tables.numbers
    counts, prints = [], []
    lacking: dict[str, Lacking] = {}
    kinds = COLUMNS | dict.fromkeys(names, np.float64)
    files = {name: (folder / f"{name}.bin").open("wb") for name in kinds}
    try:
        for number, shard in enumerate(shards):
            index = load_index([shard], store, allow_empty=True)
            columns = index.columns | {"usable": index.usable} | tables.values(index, number, claims)
            bare = replace(index, captioned=False)
            for more in tables.lacking(bare) if (bare.usable & ~index.usable).any() else ():
                first = lacking.setdefault(more.table, more._replace(samples=0))
                lacking[more.table] = first._replace(samples=first.samples + more.samples)
            for name, file in files.items():
                values = columns[name]
                kind: np.dtype = np.dtype(kinds[name])
                values = np.minimum(values, np.iinfo(kind).max) if kind.kind in "iu" else values
                file.write(values.astype(kind).tobytes())
            counts.append(len(index))
            prints.append(index.fingerprint[:16])
            advance(1)
    finally:
        for file in files.values():
            file.close()
    beside = Beside(tuple(names), tuple(sorted(tables.hashes)), tuple(lacking.values()))
    write_meta(folder, shards, counts, prints, beside)
    return sum(counts)


def write_meta(
    folder: Path, shards: Sequence[str], counts: Sequence[int], prints: Sequence[str], beside: Beside = _ALONE
) -> None:
    """Finish an index whose columns are written."""
    meta = {
        "version": VERSION, "shards": list(shards), "counts": list(counts), "fingerprints": list(prints),
        "side_tables": beside._asdict(),
    }  # fmt: skip
    temporary = folder / "meta.tmp"
    temporary.write_text(json.dumps(meta))
    temporary.replace(folder / "meta.json")


def load_consolidated(
    folder: str | Path,
    shards: Sequence[str],
    store: Store | None = None,
    side_tables: Sequence[str] = (),
    captioned: bool = True,
) -> Consolidated:
    """Map a consolidated index; `captioned` as for `load_index`.

    Raises InputError if there is none, if it is incomplete, or if it is of other shards or side tables.
    """
    folder, store = Path(folder), store or Store()
    again = f"make it: python -m data_tools.index SHARDS... consolidate={folder}"
    again += "".join(f" side_table={pattern}" for pattern in side_tables)
    if not (folder / "meta.json").is_file():
        raise InputError(f"there is no consolidated index at data.index={folder}; {again}")
    text = (folder / "meta.json").read_text()
    meta = json.loads(text)
    if meta["version"] != VERSION or meta["shards"] != list(shards):
        raise InputError(
            f"data.index={folder} is of {len(meta['shards'])} shard(s), not the {len(shards)} of data.sources; {again}"
        )
    first = np.concatenate(([0], np.cumsum(meta["counts"]))).astype(np.int64)
    beside = Beside(*(tuple(part) for part in meta["side_tables"].values()))
    if beside.hashes != tuple(side_table_hashes(side_tables, store)):
        raise InputError(f"data.index={folder} was made with other side tables than those of data.side_tables; {again}")
    if beside.lacking and not captioned:
        raise Lacking(*beside.lacking[0]).error()
    columns: dict[str, np.ndarray] = {}
    for name, kind in (COLUMNS | dict.fromkeys(beside.columns, np.float64)).items():
        path = folder / f"{name}.bin"
        if not path.is_file() or path.stat().st_size != int(first[-1]) * np.dtype(kind).itemsize:
            raise InputError(f"{path} is not whole; {again}")
        columns[name] = np.memmap(path, dtype=kind, mode="r")
    fingerprint = sha256(text.encode()).hexdigest()
    index = Consolidated(shards, first, columns, meta["fingerprints"], fingerprint, store, captioned=captioned)
    if not index.usable.any():
        raise InputError(f"data.index={folder} holds no usable sample")
    return index
