"""CPU seconds per clip of the loader against a bare decord loop, and against webdataset, over the same clips.

    python -m benchmarks.loader_cpu SHARDS... [rounds=10]

All read the same members and decode the same frames at the same size. The loader also checks every checksum, reads
captions, decodes in a child process that can be killed, and hands the pixels over; its CPU time is that of the parent
and its child. webdataset runs in one worker of torch's DataLoader, streams the shards and checks nothing. In turns in
one process; CPU time of processes, not wall time; starting workers is not counted for any.
"""

from __future__ import annotations

import io
import resource
import statistics
import sys
import time
from itertools import islice
from typing import Any

import decord
import numpy as np
import psutil
import torch
import webdataset as wds
from PIL import Image
from torch.utils.data import DataLoader

from benchmarks.report import write
from sora_train.batch import Visit
from sora_train.cost import Cost, Geometry
from sora_train.data.decode import read_member
from sora_train.data.index import expand, index_shards, load_index
from sora_train.data.loader import Loader
from sora_train.data.plan import Plan, PlanInputs, Position, source_frames
from sora_train.data.pool import Pool

_STEPS = 4


def main() -> None:
    """Measure and write the table."""
    patterns = [a for a in sys.argv[1:] if "=" not in a]
    options = dict(a.split("=") for a in sys.argv[1:] if "=" in a)
    shards = expand(patterns)
    index_shards(shards)
    inputs = PlanInputs(
        seed=0, slots=1, max_tokens=4096, fill=0.9, window=4096, fps=8.0, max_frames=17, max_pixels=4096, fit="stretch",
        tasks=(("text_to_video", 1.0),), repeats=(1.0,) * len(shards), geometry=Geometry(4, 16, 2), cost=Cost(1, 0),
    )  # fmt: skip
    plan = Plan(load_index(shards), inputs)
    steps = list(islice(plan.from_position(Position()), _STEPS))
    visits = [visit for _, slots in steps for visit in slots[0]]
    streamed = _streamed(shards, plan, visits)
    ours: list[float] = []
    theirs: list[float] = []
    bare: list[float] = []
    with Pool(1) as pool:
        clips = sum(len(step.packs[0].clips) for step in islice(Loader(plan, pool, [[0]], Position(), 2), _STEPS))
        for _ in range(int(options.get("rounds", 10))):
            before = _cpu()
            list(islice(Loader(plan, pool, [[0]], Position(), 2), _STEPS))
            ours.append((_cpu() - before) / clips)
            before = _cpu()
            for visit in visits:
                path, _, (offset, size, _) = plan.index.member(visit.sample)
                data = io.BytesIO(read_member(path, offset, size))
                height, width = visit.resize
                if not visit.fps:
                    np.asarray(Image.open(data).convert("RGB").resize((width, height)))
                    continue
                reader = decord.VideoReader(data, width=width, height=height, num_threads=1)
                reader.get_batch(source_frames(visit, float(plan.index.fps[visit.sample]))).asnumpy()
            bare.append((_cpu() - before) / len(visits))
            before = _cpu()
            count = sum(len(clips) for clips in streamed)
            theirs.append((_cpu() - before) / count)
    ratio = statistics.median(a / b for a, b in zip(ours, bare, strict=True))
    other = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    rows = [
        (name, f"{1e3 * statistics.median(v):.2f} ms", f"{1e3 * min(v):.2f} to {1e3 * max(v):.2f}")
        for name, v in (
            ("this loader, all checks on", ours),
            ("bare decord", bare),
            ("webdataset, decord, torch DataLoader", theirs),
        )
    ]
    write(
        f"CPU per clip of the loader against bare decord and webdataset ({clips} clips)",
        f"Median over {len(ours)} rounds in turns: {ratio:.3f} of bare decord, {other:.3f} of webdataset.",
        ("", "CPU per clip", "range"),
        rows,
    )


class _Decode:
    """What a worker does with a sample: all of its visits."""

    def __init__(self, wanted: dict[str, list[tuple[list[int], tuple[int, int]]]]) -> None:
        self.wanted = wanted

    def __call__(self, sample: dict[str, Any]) -> list[torch.Tensor]:
        """The clips of one sample."""
        clips = []
        for frames, (height, width) in self.wanted.get(f"{sample['__url__']}:{sample['__key__']}", []):
            if "mp4" not in sample:
                image = Image.open(io.BytesIO(sample["png"])).convert("RGB").resize((width, height))
                clips.append(torch.from_numpy(np.asarray(image)[None].copy()))
                continue
            reader = decord.VideoReader(io.BytesIO(sample["mp4"]), width=width, height=height, num_threads=1)
            clips.append(torch.from_numpy(reader.get_batch(frames).asnumpy()))
        return clips


def _streamed(shards: list[str], plan: Plan, visits: list[Visit]) -> DataLoader[Any]:
    """A DataLoader over the same visits whose worker has started and decoded all of them once."""
    wanted: dict[str, list[tuple[list[int], tuple[int, int]]]] = {}
    for visit in visits:
        frames = source_frames(visit, float(plan.index.fps[visit.sample]))
        name = f"{plan.index.shards[plan.index.shard[visit.sample]]}:{plan.index.key[visit.sample]}"
        wanted.setdefault(name, []).append((frames, visit.resize))
    dataset = wds.WebDataset(shards, shardshuffle=False, empty_check=False).map(_Decode(wanted))
    context = torch.multiprocessing.get_context("spawn")  # decord after a fork may hang
    loader = DataLoader(dataset, None, num_workers=1, multiprocessing_context=context, persistent_workers=True)
    list(loader)
    return loader


def _cpu() -> float:
    """CPU seconds of this process and its children so far."""
    gone = resource.getrusage(resource.RUSAGE_CHILDREN)  # the pool replaces its children now and then
    living = sum(sum(child.cpu_times()[:2]) for child in psutil.Process().children(recursive=True))
    return time.process_time() + living + gone.ru_utime + gone.ru_stime


if __name__ == "__main__":
    main()
