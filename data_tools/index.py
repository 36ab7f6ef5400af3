"""Index shards: Parquet beside each, with every sample's place in the tar, size, frames and checksum.

    python -m data_tools.index SHARD [SHARD ...]      paths, globs ('data/*.tar') or brace ranges ('{000..012}.tar')

Shards whose index is current are left as they are.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq

from sora_train.cli import InputError, run
from sora_train.data.index import expand, index_path, index_shards


def main() -> int:
    """Index the shards named on the command line and print one line for each."""
    patterns = sys.argv[1:]
    if {"-h", "--help"} & set(patterns):
        print(__doc__)
        return 0
    if not patterns:
        raise InputError("no shard given; --help shows how to name them")
    shards = expand(patterns)
    index_shards(shards)
    for shard in shards:
        print(_summary(shard))
    return 0


def _summary(shard: str) -> str:
    causes = Counter(pq.read_table(index_path(shard), columns=["refused"])["refused"].to_pylist())
    usable = causes.pop("", 0)
    refused = f"{causes.total()} refused" + "".join(f", {n} {cause}" for cause, n in causes.most_common())
    return f"{shard}: {usable} samples, {Path(shard).stat().st_size:,} bytes, {refused}"


if __name__ == "__main__":
    run(main)
