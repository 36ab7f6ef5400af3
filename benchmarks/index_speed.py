"""How fast shards are indexed: MB of shard per second of CPU, with headers read only and with first frames decoded.

    python -m benchmarks.index_speed SHARDS... [rounds=5]

CPU time of this process and its one child over `scan_shard`, which is all of indexing but the writing of the Parquet
file; the files are in the page cache, and starting the child is not counted. In turns; the rate is that of the median.
Beside them, what `zlib.crc32` alone does on the same bytes, which no index with checksums can be faster than.
"""

from __future__ import annotations

import statistics
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import psutil

from benchmarks.report import write
from sora_train.data.index import expand
from sora_train.data.pool import Pool
from sora_train.data.scan import scan_shard


def main() -> None:
    """Measure and write the table."""
    options = dict(a.split("=") for a in sys.argv[1:] if "=" in a)
    shards = expand([a for a in sys.argv[1:] if "=" not in a])
    rows = []
    with Pool(1) as pool:
        for shard in shards:
            usable = [row for row in scan_shard(shard, pool, pixels=True)[0].to_pylist() if not row["refused"]]
            megabytes = Path(shard).stat().st_size / 1e6
            took: dict[str, list[float]] = {"headers": [], "first frame": [], "crc32": []}
            work: dict[str, Callable[[], object]] = {
                "headers": lambda shard=shard: scan_shard(shard, pool, pixels=False),
                "first frame": lambda shard=shard: scan_shard(shard, pool, pixels=True),
                "crc32": lambda shard=shard: zlib.crc32(Path(shard).read_bytes()),
            }
            for _ in range(int(options.get("rounds", 5))):
                for name, do in work.items():
                    before = _cpu()
                    do()
                    took[name].append(_cpu() - before)
            each = [f"{megabytes / max(statistics.median(took[name]), 1e-9):,.0f}" for name in took]
            frames = sum(row["frames"] for row in usable) / max(len(usable), 1)
            about = f"{len(usable)} of {megabytes / max(len(usable), 1):.2f} MB, {frames:.0f} frames"
            rows.append((Path(shard).name, about, *each))
    write(
        "Indexing, MB of shard per second of CPU",
        "Frames counted from packets and checksums taken in all; files in the page cache.",
        ("shard", "samples", "`probe: packets`", "`probe: frame`", "reading and CRC-32 alone"),
        rows,
    )


def _cpu() -> float:
    return time.process_time() + sum(sum(child.cpu_times()[:2]) for child in psutil.Process().children(recursive=True))


if __name__ == "__main__":
    main()
