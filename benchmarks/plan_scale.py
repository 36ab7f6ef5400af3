"""The plan at scale: a hundred million samples and 1,024 ranks, the eight ranks of one node simulated on this machine.

    python -m benchmarks.plan_scale [samples=100000000] [ranks=8] [steps=24] [step_s=1.0]

The index is a consolidated one over shards of 1,000 samples; its sizes are those of benchmarks/packing.py, repeated.
Each process opens it, plans 1,024 slots and takes one slot of every step, in steps that take `step_s`.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.packing import STAGES, simulate
from benchmarks.report import write
from sora_train.core.cost import Cost, Geometry
from sora_train.data.index.consolidated import COLUMNS, load_consolidated, write_meta
from sora_train.data.order.plan import Plan, PlanInputs, Position
from sora_train.data.order.shared_windows import SharedWindows

SLOTS, WINDOW, PER_SHARD = 1024, 65_536, 1000


def write_index(folder: Path, samples: int) -> list[str]:
    """A consolidated index without shards; returns the shards' names."""
    clips = simulate(100_000, STAGES["480p"])
    columns: dict[str, np.ndarray] = {
        "usable": np.ones(100_000), "frames": clips.frames, "fps": np.full(100_000, 12.0), "width": clips.width,
        "height": clips.height, "duration": clips.frames / 12, "caption_chars": np.full(100_000, 200),
    }  # fmt: skip
    for name, kind in COLUMNS.items():
        block = columns[name].astype(kind).tobytes()
        with (folder / f"{name}.bin").open("wb") as file:
            for _ in range(samples // 100_000):
                file.write(block)
    shards = [f"/shards/train-{n:06d}.tar" for n in range(samples // PER_SHARD)]
    write_meta(folder, shards, [PER_SHARD] * len(shards), [f"{n:016x}" for n in range(len(shards))])
    return shards


def build(folder: Path, shards: list[str]) -> Plan:
    """Open the index and make the plan, as a rank does at its start."""
    tasks = (("text_to_video", 1.0),)
    index = load_consolidated(folder, shards)
    inputs = PlanInputs(0, SLOTS, 2 * 76_320, 0.9, WINDOW, 12.0, 193, STAGES["480p"], "crop", tasks,
                        (1.0,) * len(shards), Geometry(4, 8, 2), Cost(24 * 3072, 4))  # fmt: skip
    return Plan(index, inputs)


def rank(number: int, folder: Path, shards: list[str], steps: int, step_s: float, put: Callable[[Any], None]) -> None:
    """One rank: its own slot of every step."""
    me = psutil.Process()
    before, started = me.memory_full_info().pss, time.perf_counter()
    plan = build(folder, shards)
    plan.shared = SharedWindows(f"scale-{plan.hash[:16]}-{os.getppid()}", owner=False)
    coming = plan.from_position(Position())
    visits = len(next(coming)[1][number])
    first = time.perf_counter() - started
    cpu, waits, own = time.process_time(), [], []
    for _ in range(steps):
        time.sleep(step_s)
        wall, mine = time.perf_counter(), time.thread_time()
        visits += len(next(coming)[1][number])
        waits.append(time.perf_counter() - wall)
        own.append(time.thread_time() - mine)
    spent = (time.process_time() - cpu) / steps
    memory = me.memory_full_info().pss - before
    put((first, memory, spent, float(np.mean(own)), max(waits), float(np.mean(waits)), visits))
    if number == 0:
        time.sleep(1)
        plan.shared.remove()


def main() -> None:
    """Write the index, run the ranks, write the table."""
    options = dict(a.split("=") for a in sys.argv[1:])
    samples, ranks = int(options.get("samples", 100_000_000)), int(options.get("ranks", 8))
    steps, step_s = int(options.get("steps", 24)), float(options.get("step_s", 1.0))
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = write_index(folder, samples)
        size = sum(path.stat().st_size for path in folder.glob("*.bin"))
        for path in folder.glob("*.bin"):
            with path.open("rb") as file:
                while file.read(1 << 26):
                    pass  # warm
        answers = context.Queue()
        processes = [
            context.Process(target=rank, args=(n, folder, shards, steps, step_s, answers.put)) for n in range(ranks)
        ]
        for process in processes:
            process.start()
        got = np.array([answers.get(timeout=900) for _ in processes])
        for process in processes:
            process.join()
    rows = [
        ("index", f"{size / samples:.0f} bytes a sample, {size / 2**30:.2f} GiB, mapped once per node"),
        ("first step, slowest rank", f"{got[:, 0].max():.1f} s"),
        ("memory of the node's ranks together, mapped pages included", f"{got[:, 1].sum() / 2**30:.2f} GiB"),
        ("planning, CPU of all ranks of the node per step", f"{1000 * got[:, 2].sum():.1f} ms"),
        ("planning on a step's critical path, CPU of the rank's main thread", f"{1000 * got[:, 3].max():.2f} ms"),
        ("wait for the plan per step, mean", f"{1000 * got[:, 5].max():.1f} ms"),
        ("wait for the plan, longest of any step", f"{1000 * got[:, 4].max():.0f} ms"),
    ]
    about = (
        f"{samples:,} samples in {len(shards):,} shards, {SLOTS:,} slots on 1,024 ranks, windows of {WINDOW:,}, 480p "
        f"at twice the longest clip, {got[:, 6].mean() / (steps + 1):.1f} clips a slot; {ranks} ranks of one node as "
        f"processes here, steps of {step_s:g} s. Page cache warm; {os.cpu_count()} cores."
    )
    write("Planning at scale", about, ("what", "measured"), rows)
    print(f"{resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime:.1f} s of CPU in all", file=sys.stderr)


if __name__ == "__main__":
    main()
