"""Make the demo data: a world of moving shapes as captioned H.264 shards, in three splits.

    python -m data_tools.make_demo out=DIR [clips=4500] [held_out=384] [seed=0] [shard_clips=250] [workers=null]

Writes `train-*.tar`, `val-*.tar`, `test-*.tar`, an index beside each, and `demo.json`. `held_out` is the number of
samples in val, for choosing models, and in test, for reporting results. Both show movements of a colour and shape that
training never shows, and the other doesn't either. Every clip is a real mp4 (or png or jpg) of its own resolution,
aspect ratio, frame rate and duration, with four captions. The same options give the same bytes. To resume after an
interruption, give the command again.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import webdataset as wds
from PIL import Image

from data_tools.progress import progress
from sora_train.core.cli import InputError, run
from sora_train.core.media import encode_mp4
from sora_train.core.options import MAX_SEED, number, options
from sora_train.data.index.make import index_shards
from sora_train.demo_world import scenes as shapes_world
from sora_train.demo_world.render import render

VERSION = 6  # of the world and the way it is written; a change here changes the bytes


@dataclass
class Options:
    """The command's options; see the head of this file."""

    out: str
    clips: int = number(4500, least=1)
    held_out: int = number(384, least=0)
    seed: int = number(0, least=0, most=MAX_SEED)
    shard_clips: int = number(250, least=1)
    workers: int | None = number(None, least=1)


@dataclass(frozen=True)
class Shard:
    """One shard to write: samples `first` to `last` (exclusive) of a split."""

    path: Path
    split: str
    first: int
    last: int
    seed: int


def main() -> int:
    """Make the data set that the command line describes; nothing to do if it is there already."""
    asked = options(Options, __doc__)
    out = Path(asked.out)
    recipe = {"version": VERSION} | {key: getattr(asked, key) for key in ("clips", "held_out", "seed", "shard_clips")}
    if _finished(out, recipe):
        print(f"{out} already holds this demo data; nothing to do")
        return 0
    shards = _shards(out, asked)
    with progress(asked.clips + 2 * asked.held_out, "making demo clips") as advance:
        _write_all([s for s in shards if not s.path.exists()], asked.workers, advance)
    index_shards([str(s.path) for s in shards], asked.workers)
    (out / "demo-unfinished.json").replace(out / "demo.json")
    size = sum(s.path.stat().st_size for s in shards)
    print(
        f"{out}: {asked.clips} training samples, {asked.held_out} to choose by, {asked.held_out} to report, "
        f"{len(shards)} shards, {size:,} bytes"
    )
    return 0


def _finished(out: Path, recipe: dict[str, int]) -> bool:
    """Tell whether `out` has exactly this data; if not, mark it as unfinished. Raises InputError for other data."""
    done, begun = out / "demo.json", out / "demo-unfinished.json"
    try:
        out.mkdir(parents=True, exist_ok=True)
        for note in (done, begun):
            if note.exists() and json.loads(note.read_bytes()) != recipe:
                raise InputError(f"{out} holds demo data made with other options ({note.name}); choose another out=")
    except (OSError, ValueError) as error:
        raise InputError(f"cannot use {out} for the demo data: {error}; choose another out=") from error
    if done.exists():
        return True
    if not begun.exists():
        if any(out.glob("*.tar")):
            raise InputError(f"{out} holds shards that are no demo data; choose another out=")
        temporary = begun.with_suffix(".tmp")
        temporary.write_text(json.dumps(recipe) + "\n", encoding="utf-8")
        temporary.replace(begun)
    return False


def _shards(out: Path, asked: Options) -> list[Shard]:
    return [
        Shard(out / f"{split}-{number:06d}.tar", split, first, min(first + asked.shard_clips, total), asked.seed)
        for split, total in zip(shapes_world.SPLITS, (asked.clips, asked.held_out, asked.held_out), strict=True)
        for number, first in enumerate(range(0, total, asked.shard_clips))
    ]


def _write_all(shards: list[Shard], workers: int | None, advance: Callable[[int], None]) -> None:
    """Write shards in parallel; the first failure stops the rest."""
    count = min(workers or os.cpu_count() or 1, len(shards))
    if count < 2:
        for shard in shards:
            write_shard(shard)
            advance(shard.last - shard.first)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, mp_context=context) as pool:
        running = {pool.submit(write_shard, shard): shard for shard in shards}
        for future in as_completed(running):
            future.result()
            advance(running[future].last - running[future].first)


def write_shard(shard: Shard) -> None:
    """Render, encode and write one shard; it gets its final name when it is complete."""
    temporary = shard.path.with_suffix(".tar.tmp")
    with temporary.open("wb") as file:
        with wds.TarWriter(file, encoder=False, mtime=0) as tar:
            for number in range(shard.first, shard.last):
                key, extension, data, fields = make_sample(shard.split, number, shard.seed)
                tar.write({"__key__": key, extension: data, "json": json.dumps(fields).encode()})
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(shard.path)


def make_sample(split: str, number: int, seed: int) -> tuple[str, str, bytes, dict[str, object]]:
    """Key, extension, media bytes and json fields of one sample; depends on its arguments alone."""
    rng = np.random.default_rng([seed, shapes_world.SPLITS.index(split), number])
    scene = shapes_world.make_scene(rng, split)
    fields = shapes_world.describe(scene, shapes_world.captions(scene, rng))
    frames = render(scene)
    key = f"{split}_{number:06d}"
    if scene.fps:
        return key, "mp4", encode_mp4(frames, scene.fps), fields
    extension, form = ("png", "PNG") if rng.random() < 0.5 else ("jpg", "JPEG")
    picture = io.BytesIO()
    Image.fromarray(frames[0]).save(picture, format=form, quality=95)
    return key, extension, picture.getvalue(), fields


if __name__ == "__main__":
    run(main)
