"""The index of shards: where every sample lies, and what it is. Parquet beside the shard, read into plain columns.

`train-000000.tar` has `train-000000.index.parquet`. A shard without one is indexed on first use (`scan.py`). Frames are
counted, not believed; a sample that can't be used stays in the index with its cause, so that it is reported and never
planned. What the json of a sample says in plain numbers and words becomes columns for filters.

Longer than most files: what is written and what is believed of it stand side by side.
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from sora_train.config.schema import Probe
from sora_train.core.cli import InputError
from sora_train.data.index.captions import parse_captions, parse_fields
from sora_train.data.index.places import check_places, index_path, write
from sora_train.data.index.scan import META, scan_shard
from sora_train.data.index.tar import BLOCK
from sora_train.data.read.decode import LIMITS, DecodeError, Limits, Track
from sora_train.data.read.pool import Pool
from sora_train.data.read.store import PIPE, Store, scheme

VERSION = 4
_REQUESTS = 8  # shards that are asked about at a time: a remote one answers after a while
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
        """Settings that the samples were encoded with before, as `encoded.py` says; those that hold pixels have ''."""
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


def expand(
    patterns: Sequence[str],
    store: Store | None = None,
    what: str = "shard",
    keys: str = "data.sources and data.validation",
) -> list[str]:
    """Shards of glob patterns (`*`, `?`, `[...]`) and brace ranges (`{000..012}`, `{a,b}`), sorted per pattern.

    Files of another kind than shards are called `what` in errors, and configured by `keys`.
    Raises InputError for a pattern that names no file, or a local file that isn't there. A remote shard that is named
    without wildcards is looked for when it is first read.
    """
    from braceexpand import braceexpand  # comes with webdataset

    store = store or Store()
    found: list[str] = []
    for pattern in patterns:
        kind = scheme(pattern)
        try:
            paths = list(braceexpand(pattern))
        except ValueError as error:  # unbalanced braces
            raise InputError(f"{what} {pattern!r}: {error}") from error
        for path in paths:
            matches = store.list(path) if kind else _local_files(path)
            if not matches:
                raise InputError(f"no {what} at {path!r} (from {pattern!r}); check {keys}")
            found += matches
    if len(set(found)) != len(found):
        twice = sorted({path for path in found if found.count(path) > 1})
        instead = "use `repeat` to see samples more than once" if what == "shard" else f"check {keys}"
        raise InputError(f"{what} {twice[0]!r} is named twice; {instead}")
    return found


def _local_files(path: str) -> list[str]:
    names = glob.glob(path, recursive=True) if any(c in path for c in "*?[") else [path]  # noqa: PTH207
    return sorted(str(Path(name)) for name in names if Path(name).is_file())


def index_shards(
    shards: Sequence[str],
    workers: int | None = None,
    store: Store | None = None,
    limits: Limits = LIMITS,
    probe: Probe = Probe.packets,
) -> None:
    """Index every shard that has no index, or one that was made from another file, with other limits or a lesser probe.

    An index for which first pictures were decoded serves those who don't ask for that too.
    """
    store = store or Store()
    stale = missing_index(shards, store, limits, probe)
    if not stale:
        return
    count = workers or len(os.sched_getaffinity(0))
    with (
        Pool(count, limits=limits) as pool,
        _Bar(sum(map(store.size, stale))) as advance,
        ThreadPoolExecutor(min(count + 1, len(stale))) as threads,  # one more: a shard ends while another begins
    ):
        done = [threads.submit(_index, shard, pool, store, probe, advance) for shard in stale]
        try:
            for future in done:
                future.result()
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            raise


def missing_index(shards: Sequence[str], store: Store, limits: Limits, probe: Probe) -> list[str]:
    """The shards that have no current index here, after those that lie beside remote shards were taken over.

    Raises InputError for shards whose indexes would lie in one place.
    """
    check_places(shards, store)

    def lacks(shard: str) -> bool:
        return not is_current(shard, store, limits, probe) and not _adopted(shard, store, limits, probe)

    with ThreadPoolExecutor(_REQUESTS) as threads:
        return [shard for shard, lacking in zip(shards, threads.map(lacks, shards), strict=True) if lacking]


def take_index(shard: str, data: bytes, store: Store, limits: Limits, probe: Probe) -> None:
    """Take over the index that another node made of a shard; raises InputError where the shard is another one here."""
    table = pq.read_table(io.BytesIO(data))
    if not _is_of(_metadata(table.schema), shard, store, limits, probe):
        raise InputError(f"{shard} differs between the nodes of this run; give all of them the same files")
    write(table, shard, store)


class _Bar:
    """A progress bar over bytes, on a terminal; a line at the end where there is none."""

    def __init__(self, total: int) -> None:
        console = Console(stderr=True)
        columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        self._bars = Progress(
            TextColumn("indexing shards"), *columns, console=console, transient=True, disable=not console.is_terminal
        )
        self._total = total

    def __enter__(self) -> Callable[[int], None]:
        self._bars.start()
        task = self._bars.add_task("indexing", total=self._total)
        return lambda count: self._bars.advance(task, count)

    def __exit__(self, *_: object) -> None:
        self._bars.stop()


def _index(shard: str, pool: Pool, store: Store, probe: Probe, advance: Callable[[int], None]) -> None:
    try:
        identity = store.identity(shard)
        with store.local(shard) as path:
            found = scan_shard(str(path), pool, probe is Probe.frame, advance)
        mark = shard_mark(shard, store, found.headers)
    except (OSError, DecodeError) as error:
        raise InputError(f"{shard} can't be read: {getattr(error, 'strerror', None) or error}") from error
    about = {
        "version": VERSION, "shard": mark, "headers": json.dumps(found.headers), "limits": json.dumps(pool.limits),
        "identity": identity, "probe": probe.value, "ignored": json.dumps(found.ignored),
    }  # fmt: skip
    table = found.table.replace_schema_metadata({f"sora_train.{key}": str(value) for key, value in about.items()})
    write(table, shard, store)


def _adopted(shard: str, store: Store, limits: Limits | None, probe: Probe) -> bool:
    """Take over the index that lies beside a remote shard, if there is one and it was made from that very shard."""
    if scheme(shard) in (None, PIPE):
        return False
    beside = _beside(shard)
    try:
        table = pq.read_table(io.BytesIO(store.fetch(beside, 0, store.size(beside))))
    except (InputError, DecodeError, pa.ArrowException):
        return False
    known = _metadata(table.schema)
    if not _fits(known, limits, probe) or known["sora_train.shard"] != _mark_in(shard, store, known):
        return False
    about = known | {"sora_train.identity": store.identity(shard)}
    write(table.replace_schema_metadata(about), shard, store)
    return True


def upload_index(shard: str, store: Store) -> None:
    """Write the index of a remote shard beside it, where every node finds it; raises InputError where it can't be."""
    store.put(_beside(shard), index_path(shard, store).read_bytes())


def _beside(shard: str) -> str:
    return shard.removesuffix(".tar") + ".index.parquet"


def ignored_fields(shard: str, store: Store) -> dict[str, str]:
    """Why fields of a shard's jsons are no column of its index, by name."""
    found: dict[str, str] = json.loads(_metadata(pq.read_schema(index_path(shard, store)))["sora_train.ignored"])
    return found


def is_current(shard: str, store: Store, limits: Limits | None = None, probe: Probe = Probe.packets) -> bool:
    """Tell whether a shard has an index that was made from it as it is now, by this version (and with these limits).

    With `probe=frame` it must be one for which pictures were decoded.

    Raises InputError for a file in the index's place that isn't one of ours.
    """
    path = index_path(shard, store)
    if not path.is_file():
        return False
    try:
        known = _metadata(pq.read_schema(path))
    except (pa.ArrowException, OSError):
        return False
    if "sora_train.version" not in known:
        raise InputError(f"{path} is in the place of the index of {shard} and is none; move it away")
    return _is_of(known, shard, store, limits, probe)


def _is_of(known: dict[str, str], shard: str, store: Store, limits: Limits | None, probe: Probe) -> bool:
    """Tell whether an index, known by its metadata, was made from a shard as it is now, and fits what is asked."""
    if not _fits(known, limits, probe):
        return False
    if scheme(shard) is not None:
        return known["sora_train.identity"] == store.identity(shard)
    return known["sora_train.shard"] == _mark_in(shard, store, known)


def _metadata(schema: pa.Schema) -> dict[str, str]:
    return {key.decode(): value.decode("utf-8", "replace") for key, value in (schema.metadata or {}).items()}


def _fits(known: dict[str, str], limits: Limits | None, probe: Probe) -> bool:
    """Tell whether an index was made by this version, with these limits, and decoding what is asked for or more."""
    return (
        known.get("sora_train.version") == str(VERSION)
        and (limits is None or known["sora_train.limits"] == json.dumps(limits))
        and probe.value in (Probe.packets.value, known.get("sora_train.probe", Probe.frame.value))
    )


def _mark_in(shard: str, store: Store, known: dict[str, str]) -> str:
    return shard_mark(shard, store, json.loads(known["sora_train.headers"]))


def shard_mark(shard: str, store: Store, headers: Sequence[int]) -> str:
    """Mark of a shard that changes when it is replaced: its size and some of its member headers.

    Headers, not contents: a shard whose videos were damaged later keeps its index, and with it its checksums.
    """
    size = store.size(shard)
    mark = 0
    for at in headers:
        mark = zlib.crc32(store.fetch(shard, at, BLOCK), mark)
    return f"{size}|{mark}"


def load_index(
    shards: Sequence[str], store: Store | None = None, max_bad_fraction: float = 1.0, allow_empty: bool = False,
    captioned: bool = True,
) -> Index:  # fmt: skip
    """The rows of all shards' indexes. Without `captioned`, samples that lack nothing but a caption can be used too.

    Raises InputError for a shard without one, if no row is usable (unless `allow_empty`), or if a larger share than
    `max_bad_fraction` isn't.
    """
    store = store or Store()
    with ThreadPoolExecutor(_REQUESTS) as threads:
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
    """The rows of one shard's index, that beside a remote shard included; raises InputError without a current one."""
    if not is_current(shard, store) and not _adopted(shard, store, None, Probe.packets):
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
