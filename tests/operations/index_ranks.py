"""Ranks that index shards together, forked: what test_indexing.py starts.

    python -m tests.operations.index_ranks FOLDER LOCAL,LOCAL,... SLOW_S SHARD...

LOCAL is each rank's number on its node. A rank takes SLOW_S longer to index a shard, and writes to FOLDER/rank-N.json
what it indexed and the fingerprint of the index, or the error, that it then has.
"""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.multiprocessing as mp

from sora_train.config.schema import Probe
from sora_train.core.cli import InputError
from sora_train.core.world import World
from sora_train.data.index import make as indexes
from sora_train.data.index.index import load_index
from sora_train.data.read.decode import LIMITS
from sora_train.data.read.store import Store
from sora_train.data.shards import Wanted
from sora_train.operations.indexing import index_everywhere

SHORT = timedelta(seconds=3)  # the time-out of the run's collectives


def index(rank: int, local: list[int], folder: Path, shards: list[str], slow_s: float) -> None:
    """Work of one rank."""
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", None, len(local), rank)
    dist.distributed_c10d._set_pg_timeout(SHORT)  # type: ignore[attr-defined]
    node = sum(number == 0 for number in local[: rank + 1])
    world = World(rank, len(local), local[rank], 2)
    store = Store(folder / f"node-{node}", 64 << 20)
    made: list[str] = []
    true = indexes._index

    def slowly(shard: str, *more: Any) -> None:
        made.append(shard.rpartition("/")[2])
        time.sleep(slow_s)
        true(shard, *more)

    indexes._index = slowly
    if (disk := folder / f"disk-{node}").is_dir():
        os.chdir(disk)
    try:
        index_everywhere(Wanted(shards, store, LIMITS, Probe.packets), world)
        said = load_index(shards, store).fingerprint
    except InputError as error:
        said = f"error: {error}"
    (folder / f"rank-{rank}.json").write_text(json.dumps([sorted(made), said]))
    dist.destroy_process_group()


def main() -> None:
    """Fork the ranks, and wait for them."""
    folder, numbers, slow_s, *shards = sys.argv[1:]
    local = [int(number) for number in numbers.split(",")]
    mp.start_processes(index, (local, Path(folder), shards, float(slow_s)), len(local), start_method="fork")


if __name__ == "__main__":
    main()
