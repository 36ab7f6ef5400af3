"""Indexing of shards that have no current index."""

from __future__ import annotations

import io
import json
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from sora_train.config.schema import Probe
from sora_train.core.cli import InputError
from sora_train.data.index.files import REQUESTS, VERSION, adopt, is_current, is_of, metadata, shard_mark
from sora_train.data.index.places import check_places, write
from sora_train.data.index.scan import scan_shard
from sora_train.data.read.decode import LIMITS, DecodeError, Limits
from sora_train.data.read.pool import Pool
from sora_train.data.read.store import Store

_LONG = 10e9  # bytes of shards whose indexing takes so long that the faster way is named
_log = logging.getLogger(__name__)


def index_shards(
    shards: Sequence[str],
    workers: int | None = None,
    store: Store | None = None,
    limits: Limits = LIMITS,
    probe: Probe | None = None,
) -> None:
    """Index every shard without an index, and those whose index is of another file, other limits or a lesser probe.

    An index made with a deeper probe than requested is used. Without `probe` any index is used, and a missing one is
    made by decoding every frame.
    """
    store = store or Store()
    stale = missing_index(shards, store, limits, probe)
    if not stale:
        return
    count, depth = workers or len(os.sched_getaffinity(0)), probe or Probe.all
    if (total := sum(map(store.size, stale))) > _LONG and depth is Probe.all:
        _log.warning(
            "indexing %.0f GB: every frame is decoded once, to leave out damaged files; with data.probe=packets "
            "(data_tools.index: probe=packets) this takes a hundredth of the time and finds some of them in training",
            total / 1e9,
        )
    with (
        Pool(count, limits=limits) as pool,
        _Bar(total) as advance,
        ThreadPoolExecutor(min(count + 1, len(stale))) as threads,  # one more: a shard ends while another begins
    ):
        done = [threads.submit(_index, shard, pool, store, depth, advance) for shard in stale]
        try:
            for future in done:
                future.result()
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            raise


def missing_index(shards: Sequence[str], store: Store, limits: Limits, probe: Probe | None) -> list[str]:
    """Find the shards without a current index here. Indexes stored beside remote shards are copied first.

    Raises InputError if two shards would have the same index file.
    """
    check_places(shards, store)

    def lacks(shard: str) -> bool:
        return not is_current(shard, store, limits, probe) and not adopt(shard, store, limits, probe)

    with ThreadPoolExecutor(REQUESTS) as threads:
        return [shard for shard, lacking in zip(shards, threads.map(lacks, shards), strict=True) if lacking]


def take_index(shard: str, data: bytes, store: Store, limits: Limits, probe: Probe | None) -> None:
    """Take over the index that another node made of a shard; raises InputError where the shard is another one here."""
    table = pq.read_table(io.BytesIO(data))
    if not is_of(metadata(table.schema), shard, store, limits, probe):
        raise InputError(f"{shard} differs between the nodes of this run; give all of them the same files")
    write(table, shard, store)


def _index(shard: str, pool: Pool, store: Store, probe: Probe, advance: Callable[[int], None]) -> None:
    try:
        identity = store.identity(shard)
        with store.local(shard) as path:
            found = scan_shard(str(path), pool, probe, advance)
        mark = shard_mark(shard, store, found.headers)
    except (OSError, DecodeError) as error:
        raise InputError(f"{shard} can't be read: {getattr(error, 'strerror', None) or error}") from error
    about = {
        "version": VERSION, "shard": mark, "headers": json.dumps(found.headers), "limits": json.dumps(pool.limits),
        "identity": identity, "probe": probe.value, "ignored": json.dumps(found.ignored),
    }  # fmt: skip
    table = found.table.replace_schema_metadata({f"sora_train.{key}": str(value) for key, value in about.items()})
    write(table, shard, store)


class _Bar:
    """A progress bar over bytes on a terminal; elsewhere one line at the end."""

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
