"""Score the videos and pictures of shards by models of your own, into a side table for filters and weights.

    python -m data_tools.score shards=[FILES,...] 'models={NAME: FOLDER, ...}' out=FILE.parquet [frames=4]

A folder contains an ONNX or TorchScript model with `scores.json`, or an image classifier in the format of transformers;
see docs/raw_footage.md. Each model scores `frames` evenly spaced frames of each video. A sample that can't be decoded
gets no values. The table is written after every shard. Given again, the command scores only new samples; with another
model or number of frames it scores all of them again. Then train with data.side_tables=[FILE.parquet] and, for example,
data.filter="aesthetic >= 4.5".
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from data_tools.model_scores import Scorer, scorer_of
from data_tools.progress import progress
from sora_train.core.cli import InputError, run
from sora_train.core.media import read_mp4
from sora_train.core.options import number, options
from sora_train.core.outputs import usable
from sora_train.data.index.index import Index, load_index
from sora_train.data.index.make import index_shards
from sora_train.data.index.patterns import expand
from sora_train.data.read.decode import IMAGES, DecodeError
from sora_train.data.read.store import Store

_MADE_BY = b"made_by"  # in the table's metadata: the models and the number of frames
Table = dict[str, list[float | None]]  # the scores of each sample by its key


@dataclass
class Options:
    """The command's options; see the head of this file."""

    shards: list[str]
    out: str
    models: dict[str, str] = field(default_factory=dict)
    frames: int = number(4, least=1)


def main() -> int:
    """Score the samples that aren't in the table yet."""
    o = options(Options, __doc__)
    out = Path(o.out)
    if out.suffix != ".parquet" or not o.models:
        raise InputError("give models={NAME: FOLDER} and out=FILE.parquet; --help shows more")
    scorers = [scorer_of(name, folder) for name, folder in o.models.items()]
    columns = [column for one in scorers for column in one.columns]
    if twice := sorted({name for name in columns if columns.count(name) > 1 or name in ("key", "shard")}):
        raise InputError(f"models: two columns would be called {twice[0]!r}; name the models otherwise")
    made_by = json.dumps({"models": [one.hash for one in scorers], "columns": columns, "frames": o.frames})
    table = _stored(out, made_by, columns)
    store = Store()
    shards = expand(o.shards, store)
    index_shards(shards)
    new = 0
    with progress(len(shards), "scoring") as advance:
        for shard in shards:
            added = _scored(load_index([shard], store, captioned=False), scorers, table, o.frames)
            if added:
                _write(out, table, columns, made_by)
            new += added
            advance(1)
    without = sum(None in values for values in table.values())
    print(f"{out}: {new} samples scored, {len(table)} in all, {without} without values; columns {', '.join(columns)}")
    return 0


def _scored(index: Index, scorers: list[Scorer], table: Table, frames: int) -> int:
    """Add the scores of a shard's samples that aren't in the table; returns how many."""
    rows = [row for row in np.flatnonzero(index.usable).tolist() if str(index.key[row]) not in table]
    for row in rows:
        pictures = _pictures(index, row, frames)
        table[str(index.key[row])] = [
            value for one in scorers for value in ([None] * len(one.columns) if pictures is None else one.of(pictures))
        ]
    return len(rows)


def _pictures(index: Index, row: int, count: int) -> np.ndarray | None:
    """Evenly spaced frames of a sample, `(T, H, W, 3)`; None for one that can't be decoded."""
    shard, extension, (offset, size, crc32) = index.member(row)
    try:
        data = index.read(shard, (offset, size), crc32, "video")
        if extension in IMAGES:
            return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))[None]
        every = read_mp4(data)[0]
    except (OSError, ValueError, DecodeError):
        return None
    return every[np.linspace(0, len(every) - 1, min(count, len(every))).round().astype(int)]


def _stored(out: Path, made_by: str, columns: list[str]) -> Table:
    """Read the table of an earlier command; empty without one, or if its models or number of frames were others."""
    if not out.is_file():
        return {}
    try:
        found = pq.read_table(out)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"out={out} is no Parquet table ({str(error).splitlines()[0]}); name another file") from error
    if (found.schema.metadata or {}).get(_MADE_BY) != made_by.encode():
        return {}
    rows: list[dict[str, Any]] = found.to_pylist()
    return {row["key"]: [row[name] for name in columns] for row in rows}


def _write(out: Path, table: Table, columns: list[str], made_by: str) -> None:
    keys = sorted(table)
    arrays = {"key": pa.array(keys, pa.string())}
    arrays |= {name: pa.array([table[k][n] for k in keys], pa.float64()) for n, name in enumerate(columns)}
    temporary = out.with_name(f".{out.name}.tmp")
    with usable(out, "out"):
        out.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(arrays).replace_schema_metadata({_MADE_BY: made_by.encode()}), temporary)
        temporary.replace(out)


if __name__ == "__main__":
    run(main)
