"""Index shards: write a Parquet file beside each, with every sample's position in the tar, size, frames and checksum.

    python -m data_tools.index SHARD [SHARD ...] [probe=all] [workers=null] [upload=true]

    python -m data_tools.index SHARD [SHARD ...] consolidate=FOLDER [side_table=FILES ...]

Shards are paths, globs ('data/*.tar'), brace ranges ('{000..012}.tar') or URLs (https, s3, gs, hf). Those whose index
is current aren't indexed again, so that an interrupted command resumes where it was. The headers of every video and
image are read, its frames counted and its checksum computed. By default every frame is decoded as well, and a file with
damage anywhere is refused. For huge sets this takes long. `probe=packets` decodes nothing and takes a hundredth of the
time; `probe=frame` decodes each image and each video's first frame. Training then finds some of the damage when it
decodes it. An index that was made with a weaker probe than an explicit `probe=` is rebuilt.

The index of a remote shard is stored in the node's cache. With `upload=true` it is also written beside the shard (s3,
gs, hf), from where the other nodes download it.
With `consolidate` the columns that plans and filters need are also written to one memory-mapped index (19 bytes a
sample) for data.index=FOLDER; give the shards in the order of data.sources. Each entry of data.side_tables needs a
side_table= of its own; its numeric columns are written too (8 bytes a sample each), its text columns are not.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pyarrow.parquet as pq

from data_tools.progress import progress
from sora_train.config.schema import DataConfig, Probe
from sora_train.core.cli import InputError, run
from sora_train.core.options import number, options_and_paths
from sora_train.data.index.consolidated import consolidate
from sora_train.data.index.files import ignored_fields, upload_index
from sora_train.data.index.make import index_shards
from sora_train.data.index.patterns import expand
from sora_train.data.index.places import index_path
from sora_train.data.read.store import Store, scheme


@dataclass
class Options:
    """Options of the command, apart from the shards."""

    consolidate: str | None = None
    side_table: list[str] = number([])
    probe: Probe | None = None
    workers: int | None = number(None, least=1)
    upload: bool = False


def main() -> int:
    """Index the shards named on the command line and print one line for each."""
    o, patterns = options_and_paths(Options, __doc__)
    if not patterns:
        raise InputError("no shard given; --help shows how to name them")
    if o.side_table and o.consolidate is None:
        raise InputError(
            "side_table= is for consolidate=FOLDER; without data.index a run reads data.side_tables itself"
        )
    store = Store.of(DataConfig())
    shards = expand(patterns, store)
    index_shards(shards, o.workers, store, probe=o.probe)
    for shard in shards:
        print(_summary(shard, store))
        if o.upload and scheme(shard) is not None:
            upload_index(shard, store)
    if o.consolidate is not None:
        with progress(len(shards), "consolidating shards") as advance:
            count = consolidate(shards, o.consolidate, advance, store, o.side_table)
        print(f"{o.consolidate}: {count} samples of {len(shards)} shard(s)")
    return 0


def _summary(shard: str, store: Store) -> str:
    rows = pq.read_table(index_path(shard, store), columns=["refused", "frames"])
    causes = Counter(rows["refused"].to_pylist())
    usable = causes.pop("", 0)
    refused = f"{causes.total()} refused" + "".join(f", {n} {cause}" for cause, n in causes.most_common())
    uncaptioned = sum(frames > 0 for frames in rows["frames"].to_pylist()) - usable
    refused += f" ({uncaptioned} of them of use to an autoencoder)" if uncaptioned else ""
    ignored = ", ".join(f"{name} ({why})" for name, why in ignored_fields(shard, store).items())
    refused += f"; fields that are no columns: {ignored}" if ignored else ""
    return f"{shard}: {usable} samples, {store.size(shard):,} bytes, {refused}"


if __name__ == "__main__":
    run(main)
