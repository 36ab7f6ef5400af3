"""Index shards: Parquet beside each, with every sample's place in the tar, size, frames and checksum.

    python -m data_tools.index SHARD [SHARD ...]

    python -m data_tools.index SHARD [SHARD ...] consolidate=FOLDER

Shards are paths, globs ('data/*.tar'), brace ranges ('{000..012}.tar') or URLs (https, s3, gs, hf). Those whose index
is current are left as they are, so that an interrupted command goes on where it was. The index of a remote shard stands
in the node's cache; upload it beside the shard, and other nodes take it from there. With `consolidate` the columns that
plans and filters need are also written to one memory-mapped index (19 bytes a sample) for data.index=FOLDER; name the
shards in the order in which data.sources does.
"""

from __future__ import annotations

import sys
from collections import Counter

import pyarrow.parquet as pq

from data_tools.progress import progress
from sora_train.cli import InputError, run
from sora_train.config import DataConfig
from sora_train.data.consolidated import consolidate
from sora_train.data.index import expand, index_path, index_shards
from sora_train.data.source import Store


def main() -> int:
    """Index the shards named on the command line and print one line for each."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return 0
    patterns = [argument for argument in sys.argv[1:] if not argument.startswith("consolidate=")]
    if not patterns:
        raise InputError("no shard given; --help shows how to name them")
    store = Store.of(DataConfig())
    shards = expand(patterns, store)
    index_shards(shards, None, store)
    for shard in shards:
        print(_summary(shard, store))
    for folder in (a.partition("=")[2] for a in sys.argv[1:] if a.startswith("consolidate=")):
        with progress(len(shards), "consolidating shards") as advance:
            count = consolidate(shards, folder, advance, store)
        print(f"{folder}: {count} samples of {len(shards)} shard(s)")
    return 0


def _summary(shard: str, store: Store) -> str:
    causes = Counter(pq.read_table(index_path(shard, store), columns=["refused"])["refused"].to_pylist())
    usable = causes.pop("", 0)
    refused = f"{causes.total()} refused" + "".join(f", {n} {cause}" for cause, n in causes.most_common())
    return f"{shard}: {usable} samples, {store.size(shard):,} bytes, {refused}"


if __name__ == "__main__":
    run(main)
