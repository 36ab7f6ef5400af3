"""Index shards: Parquet beside each, with every sample's place in the tar, size, frames and checksum.

    python -m data_tools.index SHARD [SHARD ...] [probe=packets] [workers=null] [upload=true]

    python -m data_tools.index SHARD [SHARD ...] consolidate=FOLDER [side_table=FILES ...]

Shards are paths, globs ('data/*.tar'), brace ranges ('{000..012}.tar') or URLs (https, s3, gs, hf). Those whose index
is current aren't indexed again, so that an interrupted command resumes where it was. The frames of every video and
image are counted, its headers read and its checksum computed. `probe=frame` also decodes each image and each video's
first frame: this takes several times longer, and finds some of the damage that training would otherwise refuse.

The index of a remote shard is stored in the node's cache. With `upload=true` it is also written beside the shard (s3,
gs, hf), from where every other node takes it.
With `consolidate` the columns that plans and filters need are also written to one memory-mapped index (19 bytes a
sample) for data.index=FOLDER; name the shards in the order in which data.sources does. Each entry of data.side_tables
is given as a side_table= of its own; its numbers are written too (8 bytes a sample each), its text is not.
"""

from __future__ import annotations

import sys
from collections import Counter

import pyarrow.parquet as pq

from data_tools.progress import progress
from sora_train.config.schema import DataConfig, Probe
from sora_train.core.cli import InputError, run
from sora_train.data.index.consolidated import consolidate
from sora_train.data.index.index import expand, index_path, index_shards, upload_index
from sora_train.data.read.store import Store, scheme


def main() -> int:
    """Index the shards named on the command line and print one line for each."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return 0
    names = ("consolidate", "probe", "workers", "side_table", "upload")
    given = dict(a.split("=", 1) for a in sys.argv[1:] if a.partition("=")[0] in names)
    patterns = [a for a in sys.argv[1:] if a.partition("=")[0] not in names]
    if not patterns:
        raise InputError("no shard given; --help shows how to name them")
    tables = [a.partition("=")[2] for a in sys.argv[1:] if a.startswith("side_table=")]
    if tables and "consolidate" not in given:
        raise InputError(
            "side_table= is for consolidate=FOLDER; without data.index a run reads data.side_tables itself"
        )
    probe, workers = given.get("probe", Probe.packets.value), given.get("workers", "null")
    if probe not in {p.value for p in Probe} or (workers != "null" and not workers.isdecimal()) or workers == "0":
        raise InputError(f"probe={probe} must be packets or frame, workers={workers} a number above 0 or null")
    if given.get("upload", "true") not in ("true", "false"):
        raise InputError(f"upload={given['upload']} must be true or false")
    store = Store.of(DataConfig())
    shards = expand(patterns, store)
    index_shards(shards, None if workers == "null" else int(workers), store, probe=Probe(probe))
    for shard in shards:
        print(_summary(shard, store))
        if given.get("upload") == "true" and scheme(shard) is not None:
            upload_index(shard, store)
    if "consolidate" in given:
        with progress(len(shards), "consolidating shards") as advance:
            count = consolidate(shards, given["consolidate"], advance, store, tables)
        print(f"{given['consolidate']}: {count} samples of {len(shards)} shard(s)")
    return 0


def _summary(shard: str, store: Store) -> str:
    causes = Counter(pq.read_table(index_path(shard, store), columns=["refused"])["refused"].to_pylist())
    usable = causes.pop("", 0)
    refused = f"{causes.total()} refused" + "".join(f", {n} {cause}" for cause, n in causes.most_common())
    return f"{shard}: {usable} samples, {store.size(shard):,} bytes, {refused}"


if __name__ == "__main__":
    run(main)
