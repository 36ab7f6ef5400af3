"""Places of the indexes of shards: beside them, or in the node's cache."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from sora_train.core.cli import InputError
from sora_train.data.read.cache import Cache
from sora_train.data.read.store import Store, scheme


def index_path(shard: str, store: Store | None = None, to_write: bool = False) -> Path:
    """Path of a shard's index: beside a local shard; in the cache for remote shards and folders without write access.

    If the cache has no index for such a folder, one beside the shard is used. Raises InputError without a cache.
    """
    cache = store.cache if store else None
    if scheme(shard) is not None:
        if cache is None:
            raise InputError(f"{shard}: a remote shard needs a folder for its index; set data.cache.folder")
        return _cached(cache, shard)
    beside = Path(shard.removesuffix(".tar") + ".index.parquet")
    if os.access(beside.parent, os.W_OK):
        return beside
    cached = _cached(cache, os.path.realpath(shard)) if cache else None
    if cached and (to_write or cached.is_file() or not beside.is_file()):
        return cached
    if to_write:
        raise InputError(f"{beside.parent} can't be written, so the index needs a folder; set data.cache.folder")
    return beside


def _cached(cache: Cache, name: str) -> Path:
    return cache.folder / "index" / f"{hashlib.sha256(os.fsencode(name)).hexdigest()[:32]}.index.parquet"


def write(table: pa.Table, shard: str, store: Store) -> None:
    """Write a shard's index, atomically; raises InputError where there is no place for it."""
    final = index_path(shard, store, to_write=True)
    temporary = final.with_name(f".{final.name}.{os.getpid()}")
    try:
        if store.cache and final.is_relative_to(store.cache.folder):
            store.cache.prepare()
        final.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, temporary, compression="zstd")
        temporary.replace(final)
    except OSError as error:
        raise InputError(f"the index of {shard} can't be written to {final}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):  # of a folder that can't be used, which was said
            temporary.unlink(missing_ok=True)


def check_places(shards: Sequence[str], store: Store) -> None:
    """Raise InputError if two shards would have the same index file."""
    places: dict[Path, str] = {}
    for shard in shards:
        other = places.setdefault(index_path(shard, store), shard)
        if other != shard:
            raise InputError(f"{other} and {shard} would have the same index; rename one of them")
