"""The file that holds a shard's index: its version, the shard it belongs to, and the copy beside a remote shard."""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from sora_train.config.schema import Probe
from sora_train.core.cli import InputError
from sora_train.data.index.places import index_path, write
from sora_train.data.index.tar import BLOCK
from sora_train.data.read.decode import DecodeError, Limits
from sora_train.data.read.store import PIPE, Store, scheme

VERSION = 4
_DEPTHS = (Probe.packets, Probe.frame, Probe.all)  # each decodes all that the one before does
REQUESTS = 8  # shards that are asked about at a time: a remote one answers after a while


def is_current(shard: str, store: Store, limits: Limits | None = None, probe: Probe | None = None) -> bool:
    """Tell whether a shard has an index that was made from its present contents by this version of the code.

    Args:
        shard: Path or URL of the shard.
        store: Access to the shard.
        limits: Decoding limits that the index must have been made with; None accepts any.
        probe: Depth of decoding that the index must have been made with, or a greater one; None accepts any.

    Raises:
        InputError: A file of another kind has the name of the index.
    """
    path = index_path(shard, store)
    if not path.is_file():
        return False
    try:
        known = metadata(pq.read_schema(path))
    except (pa.ArrowException, OSError):
        return False
    if "sora_train.version" not in known:
        raise InputError(f"{path} is in the place of the index of {shard} and is none; move it away")
    return is_of(known, shard, store, limits, probe)


def is_of(known: dict[str, str], shard: str, store: Store, limits: Limits | None, probe: Probe | None) -> bool:
    """Tell whether the index with this metadata was made from the shard's current content and has the wanted depth."""
    if not _fits(known, limits, probe):
        return False
    if scheme(shard) is not None:
        return known["sora_train.identity"] == store.identity(shard)
    return known["sora_train.shard"] == _mark_in(shard, store, known)


def metadata(schema: pa.Schema) -> dict[str, str]:
    return {key.decode(): value.decode("utf-8", "replace") for key, value in (schema.metadata or {}).items()}


def _fits(known: dict[str, str], limits: Limits | None, probe: Probe | None) -> bool:
    """Tell whether an index was made by this version with these limits, and decoded at least as much as wanted."""
    return (
        known.get("sora_train.version") == str(VERSION)
        and (limits is None or known["sora_train.limits"] == json.dumps(limits))
        and _DEPTHS.index(probe or _DEPTHS[0]) <= _DEPTHS.index(Probe(known.get("sora_train.probe", Probe.frame.value)))
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


def ignored_fields(shard: str, store: Store) -> dict[str, str]:
    """Why fields of a shard's jsons are no column of its index, by name."""
    found: dict[str, str] = json.loads(metadata(pq.read_schema(index_path(shard, store)))["sora_train.ignored"])
    return found


def adopt(shard: str, store: Store, limits: Limits | None, probe: Probe | None) -> bool:
    """Copy the index beside a remote shard to the cache, if there is one and it was made from that shard."""
    if scheme(shard) in (None, PIPE):
        return False
    beside = _beside(shard)
    try:
        table = pq.read_table(io.BytesIO(store.fetch(beside, 0, store.size(beside))))
    except (InputError, DecodeError, pa.ArrowException):
        return False
    known = metadata(table.schema)
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
