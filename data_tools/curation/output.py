"""Shards, side table and records of an output folder."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_tools.curation.ledger import Ledger, full, write_lines
from data_tools.curation.scores import COLUMNS
from data_tools.curation.stage import Item
from data_tools.media_files import digest, key_of, media_extension
from data_tools.progress import progress
from data_tools.shard_writer import Journal, Mark, ShardWriter
from sora_train.config.schema import Probe
from sora_train.data.index.captions import with_captions
from sora_train.data.index.index import load_rows
from sora_train.data.index.make import index_shards
from sora_train.data.read.store import Store

SCORES, SOURCES = "scores.parquet", "sources.jsonl"


def write_shards(journal: Journal, ledger: Ledger, clips: Sequence[Item], limit: int) -> int:
    """Write the clips that are in no shard yet, in the order of their keys, and remove their work files.

    Args:
        journal: Journal of the shards.
        ledger: Ledger of the output folder.
        clips: Clips that were cut and captioned.
        limit: Size of a shard in bytes.

    Returns:
        The number of clips written.

    Raises:
        InputError: The disk is full.
    """
    stored = journal.samples
    pending = sorted((clip for clip in clips if clip["sample"] not in stored), key=lambda clip: clip["key"])
    writer = ShardWriter(journal, limit)
    try:
        with progress(len(pending), "shards") as advance:
            for clip in pending:
                data = (ledger.out / "work" / "cut" / clip["clip"]).read_bytes()
                text = json.dumps(_fields(clip), ensure_ascii=False).encode()
                mark = Mark(len(data), 0, digest(data), digest(text))
                writer.add(
                    clip["key"], clip["sample"], mark, [(media_extension(clip["clip"]) or "mp4", data), ("json", text)]
                )
                advance(1)
        writer.close()
    except OSError as error:
        raise full(journal.out, error) from error
    remove_files(ledger.out, {key_of(sample) for sample in journal.samples})
    return len(pending)


def _fields(clip: Item) -> dict[str, Any]:
    """Fields of a sample's json."""
    top, bottom, left, right = clip["border"]
    about = {
        "source": clip["source"], "licence": clip["licence"], "commercial": clip["rights"]["commercial"],
        "film": clip["name"], "film_sha256": clip["sha256"], "from_s": round(clip["start"] / clip["fps"], 3),
        "to_s": round(clip["end"] / clip["fps"], 3), "cropped": top + bottom + left + right,
    }  # fmt: skip
    if "captions" not in clip:
        return about
    return with_captions(clip["captions"], {f"about_{name}": value for name, value in clip["about"].items()} | about)


def remove_files(out: Path, keys: Collection[str]) -> None:
    """Remove the work files of the clips with these keys, which are needed only until a clip is in a shard."""
    for path in (out / "work" / "cut").glob("*"):
        if path.name.split(".")[0] in keys:
            path.unlink()


def check_shards(journal: Journal, workers: int) -> dict[str, str]:
    """Index the shards, decoding the first picture of each clip. Returns the reason of each refused clip by key."""
    shards = [str(journal.out / name) for name in journal.shards]
    index_shards(shards, workers, probe=Probe.frame)
    refused: dict[str, str] = {}
    for shard in shards:
        rows = load_rows(shard, Store()).select(["key", "refused", "detail"]).to_pylist()
        refused |= {
            row["key"]: f"{row['refused']}: {row['detail']}" for row in rows if row["refused"] not in ("", "no_caption")
        }
    return refused


def write_scores(out: Path, clips: Sequence[Item]) -> None:
    """Write the side table: the scores of every clip, whether it is in a shard or not."""
    rows = sorted(clips, key=lambda clip: clip["key"])
    columns: dict[str, Any] = {"key": pa.array([clip["key"] for clip in rows], pa.string())}
    for name in COLUMNS:
        columns[name] = pa.array([clip[name] for clip in rows], pa.float64())
    temporary = out / f".{SCORES}.tmp"
    pq.write_table(pa.table(columns), temporary)
    temporary.replace(out / SCORES)


def write_sources(out: Path, films: Sequence[Item], version: str) -> None:
    """Write a record for each film that was used: its origin, its licence, and the `version` of the curation's code."""
    write_lines(
        out / SOURCES,
        [{"film": f["name"], "sha256": f["sha256"], **f["rights"], "curation": version} for f in films],
    )
