"""Finds the training clips that samples repeat: compares hashes of all clips of shards with those of the samples."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track

from sora_train.core.cli import InputError
from sora_train.core.media import read_mp4
from sora_train.data.index.index import Index, load_index
from sora_train.data.index.make import index_shards
from sora_train.data.index.patterns import expand
from sora_train.data.read.decode import DecodeError
from sora_train.data.read.encoded import LATENT
from sora_train.data.read.store import Store
from sora_train.evaluation.commands import Options
from sora_train.evaluation.folder import read_video, videos_in
from sora_train.evaluation.memorisation import COPY, hashes, matches_page, matches_table, nearest_clips
from sora_train.evaluation.results import write_json

_SHOWN = 20  # pairs with players
_PICTURES = ("jpg", "jpeg", "png", "webp")


def find_copies(o: Options) -> int:
    """Find the nearest training clip of every video of a folder; print a table, write a page and a JSON file.

    Returns the exit code.
    """
    if not o.videos:
        raise InputError("memorised=[SHARD,...] looks for training clips in videos=DIR; name the samples")
    out, samples = o.path(".json"), videos_in(o.videos)
    store = Store()
    shards = expand(o.memorised, store)
    index_shards(shards)
    index = load_index(shards, store)
    ours = {name: hashes(*read_video(path)) for name, path in samples.items()}
    found = nearest_clips(ours, _clips(index))
    Console().print(matches_table(found))
    shown = _extract({match.clip for match in found[:_SHOWN]}, index, out.with_suffix(""))
    out.with_suffix(".html").write_text(matches_page(found, samples, shown), encoding="utf-8")
    copies = sum(match.distance <= COPY for match in found)
    write_json(out, {"samples": len(found), "copies": copies, "limit": COPY, "matches": [vars(m) for m in found]})
    print(f"{copies} of {len(found)} samples repeat a training clip; {out}, {out.with_suffix('.html')}")
    return 0


def _clips(index: Index) -> Iterator[tuple[str, np.ndarray]]:
    """Iterate over the keys and hashes of all videos of the shards, without images and files that can't be decoded."""
    for row in track(np.flatnonzero(index.usable).tolist(), description="hashing training clips"):
        shard, extension, (offset, size, crc32) = index.member(row)
        if extension in _PICTURES or extension == LATENT:
            continue
        try:
            frames, fps = read_mp4(index.read(shard, (offset, size), crc32, "video"))
        except (ValueError, DecodeError):
            continue
        yield str(index.key[row]), hashes(frames, fps)


def _extract(keys: set[str], index: Index, folder: Path) -> dict[str, Path]:
    """Write the clips of these keys to files, for the page; returns the paths by key."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for row in np.flatnonzero(np.isin(index.key, sorted(keys))).tolist():
        shard, extension, (offset, size, crc32) = index.member(row)
        path = folder / f"{index.key[row].replace('/', '_')}.{extension}"
        path.write_bytes(index.read(shard, (offset, size), crc32, "video"))
        found[str(index.key[row])] = path
    return found
