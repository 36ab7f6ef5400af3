"""Runs whose plan says how many ranks share each pack: on one, two and four ranks, resumed, and with a clip that fails.

Kinds of `worker.py`; `test_degrees.py` looks at the results.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import webdataset as wds

from sora_train.config.schema import Config
from sora_train.core.batch import Clip, Visit
from sora_train.core.media import encode_mp4
from sora_train.data.index.make import index_shards
from sora_train.data.loader import Loader
from sora_train.data.read.decode import DecodeError
from sora_train.data.shards import Shards
from tests.faults.bed import Bed, Job, differences, lines_of, outcome, samples_by_step

FPS = 2.0
FRAMES = (3, 5, 33, 9, 9, 17, 17, 5, 33, 65, 9, 25, 5, 17, 9, 21, 3, 33, 9, 13, 17, 25, 9, 121)  # 1 to 60 s
LONGEST = len(FRAMES) - 1
KEYS = (
    "data.fps=native", "data.max_frames=121", "data.max_pixels=576", "data.slots=8", "data.max_tokens=96",
    "data.pack_slots=4", "data.fill=0.8", "model.width=24", "model.heads=3", "model.depth=2",
    "optim.decay_fraction=0", "logging.validate_every=2", "steps=4",
)  # fmt: skip


def shard(path: Path, frames: Sequence[int] = FRAMES, side: int = 24) -> str:
    """Write clips of these lengths, and index them."""
    with wds.TarWriter(str(path)) as tar:
        for number, count in enumerate(frames):
            rng = np.random.default_rng(number)
            video = rng.integers(0, 256, (1, side // 4, side // 4, 3), np.uint8).repeat(4, 1).repeat(4, 2)
            moving = np.concatenate([np.roll(video, n // 2, 2) for n in range(count)])
            tar.write({"__key__": f"{number:04d}", "txt": f"block {number}".encode(), "mp4": encode_mp4(moving, FPS)})
    index_shards([str(path)], workers=1)
    return str(path)


def degrees(bed: Bed, ranks: int = 2) -> object:
    """One rank; several, straight through and in two halves; half as many, from the half on at another stage."""
    path = shard(bed.folder / "long.tar")
    keys = (*KEYS, f"data.sources.demo.shards=[{path}]", f"data.validation=[{path}]")
    one = bed.config("one", *keys, "deepspeed=zero0")
    many = bed.config("many", *keys, "deepspeed=zero1")
    half = bed.config("half", *keys, "deepspeed=zero1", "steps=2")
    rest = bed.config("half", *keys, "deepspeed=zero1")
    moved = bed.config("moved", *keys, "deepspeed=zero2")
    _finish(one, 1)
    _finish(many, ranks, then=(half,))
    shutil.copytree(half.run_dir, moved.run_dir)
    _finish(rest, ranks)
    _finish(moved, ranks // 2)
    spans = [step.spans for step in Shards(many).plan(many).plans[0].steps(0, 0)]
    return {
        "figures": {name: figures(bed.run_dir(name)) for name in ("one", "many", "moved")},
        "samples": {name: samples_by_step(bed.run_dir(name)) for name in ("one", "many", "moved")},
        "differing": differences(outcome(bed.run_dir("many")), outcome(bed.run_dir("half"))),
        "widths": [sorted({width for _, width in step}) for step in spans],
    }  # fmt: skip


def degrees_of_four(bed: Bed) -> object:
    """The same on four ranks."""
    return degrees(bed, 4)


def failing_part(bed: Bed) -> object:
    """The longest clip fails on one of the four ranks that share it, and on the only rank of another run."""
    path = shard(bed.folder / "long.tar")
    keys = (*KEYS, f"data.sources.demo.shards=[{path}]", "steps=2", "logging.validate_every=0")
    for name, ranks, place in (("one", 1, 0), ("four", 4, 2)):
        _finish(bed.config(name, *keys), ranks, place)
    return {
        "figures": {name: figures(bed.run_dir(name)) for name in ("one", "four")},
        "samples": {name: samples_by_step(bed.run_dir(name)) for name in ("one", "four")},
        "refused": {name: lines_of(bed.run_dir(name) / "quarantine.jsonl") for name in ("one", "four")},
    }


def figures(run_dir: Path) -> dict[str, list[float]]:
    """Logged figures of every step that must not depend on the ranks."""
    names = ("loss", "grad_norm", "tokens", "samples", "skipped_samples", "validation_loss")
    lines = lines_of(run_dir / "metrics.jsonl")
    return {name: [line[name] for line in lines if name in line] for name in names}


def _finish(config: Config, ranks: int, fails: int | None = None, then: Sequence[Config] = ()) -> None:
    def sabotage(mine: Config, rank: int) -> None:
        if rank == fails:
            _fail(LONGEST)

    job = Job(config, ranks, sabotage, then=then)
    if code := job.wait():
        raise RuntimeError(f"{ranks} rank(s) ended with {code}:\n{job.log.read_text()[-6000:]}")


def _fail(sample: int) -> None:
    """Have this rank's loader fail for a sample."""
    true = Loader._clip

    def failing(self: Loader, visit: Visit, request: object) -> Clip:
        if visit.sample == sample:
            raise DecodeError("timeout", "this rank alone was too slow")
        return true(self, visit, request)  # type: ignore[arg-type]

    Loader._clip = failing  # type: ignore[method-assign,assignment]
