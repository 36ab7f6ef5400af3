"""Shared parts of the trials of bad input: small media, shards, damage behind an index, and the ledger of a run."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import webdataset as wds
from PIL import Image

from sora_train.config.schema import Config
from sora_train.core.media import encode_mp4
from sora_train.data.index.index import Index
from sora_train.data.shards import Shards

Row = tuple[str, int, int, int, int]  # kind, inputs, refused by the index, refused in training, trained on
Found = tuple[list[Row], list[str]]  # and what was wrong
RANKS = 2
QUIET = ("data.validation=[]", "checkpoint.every_steps=100000", "data.prefetch_steps=2")


def video(seed: int, frames: int = 9, ending: bytes = b"") -> bytes:
    """A video of 64x64 that depends on its seed alone, with bytes behind its end that every decoder passes over."""
    small = np.random.default_rng(seed).integers(0, 256, (frames, 8, 8, 3), np.uint8)
    return encode_mp4(small.repeat(8, 1).repeat(8, 2), 8.0) + ending


def picture(seed: int) -> bytes:
    """A PNG of 16x16."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write(path: Path, samples: Sequence[tuple[str, dict[str, bytes]]]) -> str:
    """A shard of samples (key, members) as webdataset writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with wds.TarWriter(str(path)) as tar:
        for key, members in samples:
            tar.write({"__key__": key, **members})
    return str(path)


def sources(shards: Sequence[str]) -> str:
    """The override that trains on these shards."""
    return f"data.sources.demo.shards=[{','.join(shards)}]"


def damage(index: Index, rows: Sequence[int], change: Callable[[int, bytes], bytes]) -> None:
    """Change the media of rows in place, behind the back of their index; what is changed really differs."""
    for row in rows:
        path, _, (offset, size, _) = index.member(row)
        with Path(path).open("r+b") as file:
            file.seek(offset)
            old = file.read(size)
            while (new := change(row, old)) == old:
                pass
            assert len(new) == size
            file.seek(offset)
            file.write(new)


def ledger(run_dir: Path) -> list[dict[str, Any]]:
    """Every line of every rank's ledger."""
    return [json.loads(line) for path in run_dir.glob("ledger/*.jsonl") for line in path.read_text().splitlines()]


def unaccounted(run_dir: Path, index: Index, epoch: int = 0) -> tuple[Counter[int], dict[int, str], list[str]]:
    """Rows trained on in an epoch, rows refused with their causes, and what doesn't add up: each usable row must have
    come once or been refused once, and quarantine.jsonl must hold each refusal, the index's own as step 0."""
    lines, wrong = [line for line in ledger(run_dir) if line["position"][0] == epoch], []
    trained = Counter(row for line in lines for row in line["samples"])
    refusals = [(r["sample"], r["cause"]) for line in lines for r in line["refused"]]
    refused, usable = dict(refusals), set(np.flatnonzero(index.usable).tolist())
    if any(count > 1 for count in trained.values()) or len(refusals) != len(refused) or trained.keys() & refused.keys():
        wrong.append("a sample came twice in an epoch")
    if lost := usable - trained.keys() - refused.keys():
        wrong.append(f"{len(lost)} samples were lost without a word, such as {index.key[lost.pop()]!r}")
    if strange := (trained.keys() | refused.keys()) - usable:
        wrong.append(f"{len(strange)} samples came that the index refuses")
    noted = [json.loads(line) for line in (run_dir / "quarantine.jsonl").read_text().splitlines()]
    before = Counter((n["key"], n["cause"]) for n in noted if n["step"] == 0)
    if before != Counter((str(index.key[row]), str(index.refused[row])) for row in np.flatnonzero(~index.usable)):
        wrong.append("quarantine.jsonl has not what the index refuses, each once with its cause")
    during = Counter((n["key"], n["cause"]) for n in noted if n["step"] > 0)
    if during != Counter((r["key"], r["cause"]) for line in ledger(run_dir) for r in line["refused"]):
        wrong.append("quarantine.jsonl has not what training refused, each once with its cause")
    return trained, refused, wrong


def steps_of_an_epoch(config: Config) -> int:
    """Number of steps in the first epoch of a configuration."""
    plan = Shards(config).plan(config).plans[0]
    return sum(len(plan.steps(0, w)) for w in range(len(plan.windows(0))))


def tail(config: Config) -> str:
    """The last that a run said."""
    return Path(config.run_dir).with_suffix(".out").read_text()[-3000:]
