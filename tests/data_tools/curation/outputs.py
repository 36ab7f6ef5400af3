"""Options for small films, and what the command wrote, read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import webdataset as wds

SMALL = ("short_side=64", "min_seconds=1", "trim=0.1", "crf=12", "shard_size=0.1")


def lines(path: Path) -> list[dict[str, Any]]:
    """The entries of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def shards_of(out: Path) -> dict[str, bytes]:
    """The bytes of the shards of an output folder, by name."""
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.tar"))}


def samples(out: Path) -> list[dict[str, Any]]:
    """The samples in the shards of an output folder."""
    shards = sorted(map(str, out.glob("*.tar")))
    return list(wds.WebDataset(shards, shardshuffle=False, empty_check=False).decode())
