"""CPU time of the loader and of indexing, on H.264 of 480p and 720p with key frames near and far apart.

    python -m benchmarks.data_speed [rounds=10] [clips=6] [seconds=8] [folder=DIR] [shards=FILE.tar,...] [write=true]

The clips are made here (`footage`): a camera pans over a textured scene in which things move, with some noise; 30
frames a second. Shards of one's own may be named too. Three ways to the same frames of the same clips, at the same
size (17 frames at 8 a second, 256p), in turns, by CPU time of the process and its children:

- our loader, all checks on: checksums, captions, decoding in a child that can be killed, pixels handed over;
- a bare loop: read the member, decord.VideoReader of the wanted size, get_batch;
- webdataset streaming the shard into one worker of torch's DataLoader, which decodes with decord and checks nothing.

Ratios are those of each round; the median and the middle half of the rounds stand in the table. Indexing is
`scan_shard` with frames counted from packets and checksums taken (`data.probe: packets`), in MB of shard per second of
CPU, files in the page cache; beside it what reading and `zlib.crc32` alone come to, and what an index for which every
frame is decoded (the default) takes for an hour of video. Starting processes isn't counted.
"""

from __future__ import annotations

import io
import resource
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import decord
import numpy as np
import psutil
import torch
import webdataset as wds
from PIL import Image
from torch.utils.data import DataLoader

from benchmarks.report import command, write
from sora_train.config.schema import Probe
from sora_train.core.batch import Visit
from sora_train.core.cli import run
from sora_train.core.cost import Cost, Geometry
from sora_train.core.media import encode_mp4
from sora_train.core.options import options
from sora_train.data.index.index import load_index
from sora_train.data.index.make import index_shards
from sora_train.data.index.scan import scan_shard
from sora_train.data.loader import Loader
from sora_train.data.order.plan import Plan, PlanInputs, Position
from sora_train.data.order.times import source_frames
from sora_train.data.read.decode import read_member
from sora_train.data.read.pool import Pool

_FPS = 30.0
SETS = (("480p", 480, 854, 12), ("480p", 480, 854, 250), ("720p", 720, 1280, 12), ("720p", 720, 1280, 250))


@dataclass
class Options:
    """Options: the amount of work, and its folder."""

    rounds: int = 10
    clips: int = 6  # of a set
    seconds: float = 8.0
    folder: str = ""  # where the shards are kept for the next time
    shards: str = ""  # further ones, with commas between
    write: bool = False  # the table into docs/results.md


def footage(seed: int, frames: int, height: int, width: int) -> Iterator[np.ndarray]:
    """`frames` pictures `(1, H, W, 3)`: octaves of texture under a moving camera, five things that move, noise."""
    rng = np.random.default_rng(seed)
    tall, wide = height + 256, width + 512
    scene = np.zeros((tall, wide, 3), np.float32)
    for octave in range(2, 9):
        cells = (tall // 2**octave + 2, wide // 2**octave + 2)
        for channel in range(3):
            noise = Image.fromarray(rng.normal(0, 4.0 * octave, cells).astype(np.float32))
            scene[..., channel] += np.asarray(noise.resize((wide, tall), Image.Resampling.BICUBIC))
    scene += 118
    things = [(rng.integers(40, 160), rng.uniform(0, 1, 2), rng.uniform(-3, 3, 2)) for _ in range(5)]
    patches = [
        rng.normal(128, 30, (size // 8 + 1, size // 8 + 1, 3)).repeat(8, 0).repeat(8, 1) for size, _, _ in things
    ]
    grain = rng.normal(0, 1.5, (8, height, width, 1)).astype(np.float32)
    for t in range(frames):
        left, top = 200 + 180 * np.sin(t / 70 + seed), 100 + 90 * np.sin(t / 110)
        view = scene[int(top) : int(top) + height, int(left) : int(left) + width].copy()
        for (size, at, speed), patch in zip(things, patches, strict=True):
            y, x = ((at * (height, width) + speed * t) % (height - size, width - size)).astype(int)
            view[y : y + size, x : x + size] = patch[:size, :size]
        yield np.clip(view + grain[t % 8], 0, 255).astype(np.uint8)[None]


def make(folder: Path, name: str, height: int, width: int, gop: int, clips: int, seconds: float) -> str:
    """A shard of a set; one that is there is kept."""
    path = folder / f"{name}-gop{gop}-{clips}x{seconds:g}s.tar"
    if not path.is_file():
        with wds.TarWriter(str(path)) as tar:
            for number in range(clips):
                video = encode_mp4(footage(number, round(seconds * _FPS), height, width), _FPS, crf=24, gop=gop)
                tar.write({"__key__": f"{number:05d}", "mp4": video, "txt": b"a scene with things that move"})
    return str(path)


class Ways:
    """The ways to the same clips of one shard; each returns CPU milliseconds for a clip."""

    def __init__(self, shard: str, pool: Pool) -> None:
        inputs = PlanInputs(
            seed=0, slots=1, max_tokens=4096, fill=0.9, window=4096, fps=8.0, max_frames=17, max_pixels=65536,
            fit="stretch", tasks=(("text_to_video", 1.0),), repeats=(2.0,), geometry=Geometry(4, 16, 2),
            cost=Cost(1, 0),
        )  # fmt: skip
        self.pool, self.plan = pool, Plan(load_index([shard]), inputs)
        self.steps = sum(len(self.plan.steps(0, w)) for w in range(len(self.plan.windows(0))))
        planned = islice(self.plan.from_position(Position()), self.steps)
        self.visits = [visit for _, slots in planned for visit in slots[0]]
        self.streamed = _streamed(shard, self.plan, self.visits)
        self.ours()  # starts the child, and warms the page cache

    def ours(self) -> float:
        """The loader, without steps in flight: those that nobody takes would be decoded at the cost of the next way."""
        before = cpu()
        clips = sum(len(step.packs[0].clips) for step in
                    islice(Loader(self.plan, self.pool, [[0]], Position(), 1), self.steps))  # fmt: skip
        assert clips == len(self.visits)
        return 1e3 * (cpu() - before) / clips

    def bare(self) -> float:
        """decord in a loop."""
        before = cpu()
        for visit in self.visits:
            path, _, (offset, size, _) = self.plan.index.member(visit.sample)
            _decode(read_member(path, offset, size), _frames(self.plan, visit), visit.resize)
        return 1e3 * (cpu() - before) / len(self.visits)

    def webdataset(self) -> float:
        """webdataset, decord and a DataLoader."""
        before = cpu()
        assert sum(len(clips) for clips in self.streamed) == len(self.visits)
        return 1e3 * (cpu() - before) / len(self.visits)


def _frames(plan: Plan, visit: Visit) -> list[int]:
    return source_frames(visit, float(plan.index.fps[visit.sample]))


def _decode(data: bytes, frames: list[int], resize: tuple[int, int]) -> np.ndarray:
    height, width = resize
    return decord.VideoReader(io.BytesIO(data), width=width, height=height, num_threads=1).get_batch(frames).asnumpy()


class _Worker:
    """Work on one sample: all of its visits."""

    def __init__(self, wanted: dict[str, list[tuple[list[int], tuple[int, int]]]]) -> None:
        self.wanted = wanted

    def __call__(self, sample: dict[str, Any]) -> list[torch.Tensor]:
        """The clips of one sample."""
        return [torch.from_numpy(_decode(sample["mp4"], *visit)) for visit in self.wanted.get(sample["__key__"], [])]


def _streamed(shard: str, plan: Plan, visits: Sequence[Visit]) -> DataLoader[Any]:
    """A DataLoader over the same visits whose worker has started and decoded all of them once."""
    wanted: dict[str, list[tuple[list[int], tuple[int, int]]]] = {}
    for visit in visits:
        wanted.setdefault(str(plan.index.key[visit.sample]), []).append((_frames(plan, visit), visit.resize))
    dataset = wds.WebDataset(shard, shardshuffle=False, empty_check=False).map(_Worker(wanted))
    context = torch.multiprocessing.get_context("spawn")  # decord after a fork may hang
    loader = DataLoader(dataset, None, num_workers=1, multiprocessing_context=context, persistent_workers=True)
    list(loader)
    return loader


def cpu() -> float:
    """CPU seconds of this process and its children so far."""
    gone = resource.getrusage(resource.RUSAGE_CHILDREN)  # the pool replaces its children now and then
    living = sum(sum(child.cpu_times()[:2]) for child in psutil.Process().children(recursive=True))
    return time.process_time() + living + gone.ru_utime + gone.ru_stime


def indexing(shard: str, pool: Pool, rounds: int) -> tuple[list[float], list[float]]:
    """MB of shard per second of CPU in each round: indexing it by packets, and reading it with a CRC-32 alone.

    Children's CPU time is counted in hundredths of a second, so that each round goes over the shard several times.
    """
    megabytes, again = Path(shard).stat().st_size / 1e6, 20
    work: tuple[Callable[[], object], ...] = (
        lambda: scan_shard(shard, pool, Probe.packets), lambda: zlib.crc32(Path(shard).read_bytes()),
    )  # fmt: skip
    rates: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for do, into in zip(work, rates, strict=True):
            before = cpu()
            for _ in range(again):
                do()
            into.append(again * megabytes / max(cpu() - before, 1e-9))
    return rates


def of_every_frame(shard: str, pool: Pool, rounds: int, seconds: float) -> list[float]:
    """CPU seconds in each round for an hour of video: indexing a shard of so many seconds, every frame decoded."""
    times = []
    for _ in range(rounds):
        before = cpu()
        scan_shard(shard, pool, Probe.all)
        times.append((cpu() - before) * 3600 / seconds)
    return times


def spread(values: Sequence[float], form: str) -> str:
    """The median, and the middle half."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:{form}} ({low:{form}} to {high:{form}})"


def main() -> None:
    """Measure and write the table."""
    o = options(Options, __doc__)
    rows = []
    with tempfile.TemporaryDirectory() as temporary, Pool(1) as pool:
        folder = Path(o.folder or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        named = [(f"{s}, a key frame every {gop} frames", make(folder, s, h, w, gop, o.clips, o.seconds))
                 for s, h, w, gop in SETS]  # fmt: skip
        named += [(Path(shard).name, shard) for shard in filter(None, o.shards.split(","))]
        index_shards([shard for _, shard in named], workers=1)
        for name, shard in named:
            ways = Ways(shard, pool)
            took: dict[str, list[float]] = {"ours": [], "bare": [], "webdataset": []}
            for _ in range(o.rounds):
                for way, times in took.items():
                    times.append(getattr(ways, way)())
            ours, bare, theirs = took.values()
            index, crc = indexing(shard, pool, o.rounds)
            sizes, frames = ways.plan.index.size, ways.plan.index.frames
            rows.append((
                f"{name} ({sizes.mean() / 1e6:.2f} MB, {frames.mean():.0f} frames)", spread(ours, ".1f"),
                spread(bare, ".1f"), spread(theirs, ".1f"),
                spread([a / b for a, b in zip(ours, bare, strict=True)], ".3f"),
                spread([a / b for a, b in zip(ours, theirs, strict=True)], ".3f"),
                spread(index, ",.0f"), spread(crc, ",.0f"),
                spread(of_every_frame(shard, pool, o.rounds, float(ways.plan.index.duration.sum())), ",.0f"),
            ))  # fmt: skip
            print(" | ".join(rows[-1]), flush=True)
    header = ("clips", "loader, ms", "bare decord, ms", "webdataset, ms", "loader / bare", "loader / webdataset",
              "indexing by packets, MB/s", "reading and CRC-32 alone, MB/s",
              "every frame decoded, s for an hour")  # fmt: skip
    about = (
        f"`{command()}`. CPU per clip over {len(ways.visits)} visits, {o.rounds} rounds in turns: median, in brackets "
        "the middle half of the rounds."
    )
    if o.write:
        write("CPU of the loader and of indexing", about, header, rows)


if __name__ == "__main__":
    run(main)
