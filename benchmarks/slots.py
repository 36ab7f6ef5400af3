"""Slots of real steps: packs that each have their own ranks beside a fixed degree, and balance in measured seconds.

    python -m benchmarks.slots [rounds=3] [steps=6] [tiny=true]

First, clips of 1 to 60 s (log-uniform; latents that are ready) on four ranks: all packs shared by four ranks, as the
longest clip needs (`parallel.sequence=4`), beside packs that take one to four slots (`data.pack_slots=4`), the same
clips in each step. Then clips of several lengths and sizes and images, encoded by the VAE, on two ranks: packs
balanced by FLOPs and by what `sora_train.calibrate` measures first. All ways are built in the same processes and take
their steps in turns, forward and backward pass and update, one thread a rank, at a learning rate of 0, so that losses
can be compared. Where other processes compete for the cores only CPU seconds mean something. `tiny=true` tries it all
on a small network and writes nothing.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_dir

from benchmarks.report import write
from benchmarks.slots_worker import Asked, Way
from sora_train.config.cost import balancing_cost, geometry
from sora_train.config.hydra import CONF
from sora_train.config.load import build
from sora_train.config.schema import Config
from sora_train.core.cli import number, options
from sora_train.core.cli import run as run_command
from sora_train.core.seeds import below, uniform
from sora_train.data.order.packing import pack
from sora_train.forecast.calibration import as_json, fit, measure

_TINY = ["model.width=32", "model.heads=2", "model.ffn=64"]
_LONG = [
    "experiment=demo", "optim.matrices=adamw", "data.max_frames=241", "data.max_tokens=768", "data.slots=8",
    "data.pack_slots=4",
]  # fmt: skip
_MIXED = ["experiment=demo", "optim.matrices=adamw", "data.max_frames=33", "data.max_tokens=1536", "data.slots=8"]
_FILL = 0.85

Steps = list[list[list[int]]]


@dataclass
class Options:
    """The measurements to take."""

    rounds: int = number(3, least=1)
    steps: int = number(6, least=1)
    tiny: bool = False


def main() -> int:
    """Measure, print, and write the tables to docs/results.md."""
    o = options(Options, __doc__)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        long, mixed = (run(o, Path(folder)) for run in (long_clips, mixed_sizes))
    if o.tiny:
        for row in (*long, *mixed):
            print(" | ".join(row))
        return 0
    cores = f"one thread a rank; {len(os.sched_getaffinity(0))} cores, shared with other processes"
    about = (
        f"Four ranks, clips of 1 to 60 s at 4 frames a second (latents of 48 x 48), {o.steps} steps of 8 slots of 768 "
        f"tokens, each taken {o.rounds} times in turns, {cores}. Balance: mean over max of the slots' CPU seconds, "
        "median of the rounds, averaged over steps."
    )
    header = (
        "packs",
        "step, median s",
        "CPU s of all ranks",
        "steps a CPU second",
        "balance",
        "loss differs",
    )
    write("A degree per pack beside a fixed one", about, header, long)
    about = (
        f"Two ranks, clips of 1 to 33 frames in 24 x 24 to 48 x 48, encoded by the VAE in the step, {o.steps} steps of "
        f"8 slots, each taken {o.rounds} times in turns, {cores}. Balance as above, of the same slots."
    )
    write("Balance of slots in measured seconds", about, ("balanced by", "balance", "lowest step"), mixed)
    return 0


def long_clips(o: Options, folder: Path) -> list[tuple[str, ...]]:
    """Rows of the first table."""
    config = _config([*_LONG, *(_TINY if o.tiny else [])])
    d, n = config.data, np.arange(40 * o.steps)
    seconds = 60.0 ** uniform(11, n)
    frames = 1 + (4 * seconds).astype(np.int64) // 2 * 2
    sizes = [(int(f), 48, 48) for f in frames]
    by_flops = _planned(config, sizes, o.steps)
    fixed = [_redealt(config, sizes, step, d.slots // 4, 4 * d.max_tokens) for step in by_flops]
    measured = _calibrated(config, folder, latents=True, rounds=o.rounds)
    by_seconds = [_redealt(measured, sizes, step, d.slots, d.max_tokens, d.pack_slots) for step in by_flops]
    ways = [
        Way("shared by four ranks, all", fixed, fixed=4),
        Way("one to four slots each, by FLOPs", by_flops, d.pack_slots),
        Way("one to four slots each, by seconds", by_seconds, d.pack_slots),
    ]  # fmt: skip
    found = _measure(sizes, True, ways, 4, o, folder)
    first = found[ways[0].name]
    rows = []
    for way in ways:
        mine = found[way.name]
        rate = sum(first["cpu_seconds"]) / sum(mine["cpu_seconds"])
        differs = max(abs(a / b - 1) for a, b in zip(mine["losses"], first["losses"], strict=True))
        balanced = "-" if way.fixed > 1 else f"{statistics.mean(balance(mine['slots'])):.1%}"
        rows.append((
            way.name, f"{statistics.median(mine['seconds']):.2f}", f"{statistics.median(mine['cpu_seconds']):.2f}",
            f"{rate:.2f} times", balanced, f"{differs:.0e}",
        ))  # fmt: skip
    return rows


def mixed_sizes(o: Options, folder: Path) -> list[tuple[str, ...]]:
    """Rows of the second table."""
    config = _config([*_MIXED, *(_TINY if o.tiny else [])])
    n = np.arange(250 * o.steps)
    frames = 1 + 2 * below(17, 3, n) * (uniform(5, n) > 0.2)
    sides = 24 + 12 * below(3, 4, n)
    sizes = [(int(f), int(s), int(s)) for f, s in zip(frames, sides, strict=True)]
    by_flops = _planned(config, sizes, o.steps)
    measured = _calibrated(config, folder, latents=False, rounds=o.rounds)
    ways = [Way("FLOPs", by_flops), Way("seconds", [_redealt(measured, sizes, s, 8, 1536) for s in by_flops])]
    found = _measure(sizes, False, ways, 2, o, folder)
    each = {way.name: balance(found[way.name]["slots"]) for way in ways}
    return [(name, f"{statistics.mean(values):.1%}", f"{min(values):.1%}") for name, values in each.items()]


def balance(slots: list[list[list[float]]]) -> list[float]:
    """Mean over max of the slots of each step, from their seconds by round, step and slot: the medians of rounds."""
    medians = np.median(np.array(slots), axis=0)
    return [float(step.mean() / step.max()) for step in medians]


def _config(overrides: list[str]) -> Config:
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        return build(compose("train", ["run_dir=runs/slots", *overrides]), need_vae=False)


def _planned(config: Config, sizes: list[tuple[int, int, int]], count: int) -> Steps:
    """The first steps of a window of these clips."""
    d = config.data
    return _dealt(config, sizes, list(range(len(sizes))), d.slots, d.max_tokens, d.pack_slots)[:count]


def _redealt(
    config: Config, sizes: list[tuple[int, int, int]], step: list[list[int]], slots: int, cap: int, most: int = 1
) -> list[list[int]]:
    """The clips of a step in other slots."""
    (dealt,) = _dealt(config, sizes, sorted(n for slot in step for n in slot), slots, cap, most, 1.0)
    return dealt


def _dealt(
    config: Config, sizes: list[tuple[int, int, int]], clips: list[int], slots: int, cap: int, most: int,
    fill: float = _FILL,
) -> Steps:  # fmt: skip
    cost, grid = balancing_cost(config), geometry(config)
    tokens = np.array([grid.tokens(*sizes[n]) for n in clips])
    pixels = np.array([np.prod(sizes[n]) for n in clips])
    steps = pack(
        tokens, cost.of_clips(tokens, pixels), slots, cap, fill, 1, most=most, undivided=cost.undivided(tokens, pixels)
    )
    return [[[clips[n] for n in slot] for slot in step] for step in steps]


def _calibrated(config: Config, folder: Path, latents: bool, rounds: int) -> Config:
    """The configuration with the seconds that its packs take here."""
    path = folder / f"cost-{latents}.json"
    result = fit(config, list(measure(config, torch.device("cpu"), rounds, latents)))
    path.write_text(json.dumps(as_json(config, result, "here")))
    return replace(config, data=replace(config.data, cost=str(path)))


def _measure(
    sizes: list[tuple[int, int, int]], latents: bool, ways: list[Way], ranks: int, o: Options, folder: Path
) -> dict[str, dict[str, Any]]:
    """Start the ranks; returns what each way took."""
    overrides = _LONG if latents else _MIXED
    asked = Asked([*overrides, *(_TINY if o.tiny else [])], sizes, latents, ways, o.rounds, str(folder / "found.json"))
    given = folder / "asked.json"
    given.write_text(json.dumps(asdict(asked)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = [
        {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_PORT": str(port),
         "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
        for rank in range(ranks)
    ]  # fmt: skip
    command = [sys.executable, "-m", "benchmarks.slots_worker", str(given)]
    started = [subprocess.Popen(command, env=os.environ | place, cwd=Path(__file__).parents[1]) for place in places]
    try:
        codes = [process.wait() for process in started]
    finally:
        for process in started:
            process.kill()
    if any(codes):
        raise RuntimeError(f"the ranks ended with {codes}")
    return dict(json.loads(Path(asked.out).read_text()))


if __name__ == "__main__":
    run_command(main)
