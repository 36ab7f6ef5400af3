"""Slots of real steps: packs that each have their own ranks beside a fixed degree, and balance in measured seconds.

    python -m benchmarks.slots [tables=[long,mixed]] [rounds=3] [steps=6] [tiny=true]

long    clips of 1 to 60 s (log-normal, median 4.5 s, as in `benchmarks.packing`; one in fifty of 60 s; latents that are
        ready) on four ranks, and a tiny model: packs that take one to four slots (`data.pack_slots=4`), beside all
        packs shared by four ranks (`parallel.sequence=4`), and none, which needs four times the memory; the same
        clips in each step
mixed   clips of several lengths and sizes and images, encoded by the demo's VAE, on two ranks: packs balanced by FLOPs
        and by what `sora_train.calibrate` measures first

All ways are built in the same processes and take their steps in turns, forward and backward pass and update, one thread
a rank, at a learning rate of 0, so that losses can be compared. A step takes what its slowest rank takes, where each
has a core; so its rate is that of the slowest rank's CPU seconds, which other processes and ranks that share a core
don't change. `tiny=true` tries it with a smaller model yet and writes nothing.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_dir

from benchmarks.ranks import run_ranks
from benchmarks.report import write
from benchmarks.slots_worker import Asked, Size, Way
from sora_train.config.cost import balancing_cost, geometry
from sora_train.config.hydra import CONF
from sora_train.config.load import build
from sora_train.config.schema import Config
from sora_train.core.cli import run as run_command
from sora_train.core.options import number, options
from sora_train.core.seeds import below, uniform
from sora_train.data.order.packing import pack, spans
from sora_train.forecast.calibration import as_json, fit, measure

_TINY = ["model.width=16", "model.heads=2", "model.ffn=32"]
_LONG = [
    "experiment=demo", "optim.matrices=adamw", "model.width=32", "model.ffn=128", "data.slots=8",
    "data.max_frames=241", "data.max_tokens=384", "data.pack_slots=4",
]  # fmt: skip
_MIXED = ["experiment=demo", "optim.matrices=adamw", "data.max_frames=33", "data.max_tokens=768", "data.slots=8"]
_FILL = 0.85

_TIMES = ("seconds", "cpu_seconds", "slowest")

Steps = list[list[list[int]]]
Table = tuple[str, str, tuple[str, ...], list[tuple[str, ...]]]  # title, about, header, rows


@dataclass
class Options:
    """The measurements to take."""

    tables: list[str] = field(default_factory=lambda: ["long", "mixed"])
    rounds: int = number(3, least=1)
    steps: int = number(6, least=1)
    tiny: bool = False


def main() -> int:
    """Measure, print, and write the tables to docs/results.md."""
    o = options(Options, __doc__)
    torch.set_num_threads(1)
    for table in o.tables:
        with tempfile.TemporaryDirectory() as folder:
            title, about, header, rows = {"long": long_clips, "mixed": mixed_sizes}[table](o, Path(folder))
        if o.tiny:
            for row in rows:
                print(" | ".join(row))
        else:
            write(title, f"{about} One thread a rank; {len(os.sched_getaffinity(0))} cores, shared.", header, rows)
    return 0


def long_clips(o: Options, folder: Path) -> Table:
    """A degree for each pack beside a fixed one."""
    config = _config([*_LONG, *(_TINY if o.tiny else [])])
    d, n, normal = config.data, np.arange(60 * o.steps), NormalDist()
    low, high = (normal.cdf(math.log(s / 4.5) / 0.65) for s in (1, 60))
    drawn = low + uniform(11, n) * (high - low)
    seconds = 4.5 * np.exp(0.65 * np.array([normal.inv_cdf(u) for u in drawn.tolist()]))
    seconds[::50] = 60.0
    sizes = [(int(f), 36, 36) for f in 1 + (4 * seconds).astype(np.int64) // 2 * 2]
    own = _dealt(config, sizes, range(len(sizes)), (d.slots, d.max_tokens, d.pack_slots))[: o.steps]
    all_shared = [_dealt(config, sizes, _clips(step), (d.slots // 4, 4 * d.max_tokens, 1), 1.0)[0] for step in own]
    alone = [_dealt(config, sizes, _clips(step), (d.slots, 4 * d.max_tokens, 1), 1.0)[0] for step in own]
    ways = [
        Way("one to four slots each", own, d.pack_slots), Way("all shared by four ranks", all_shared, fixed=4),
        Way("none shared, four times the memory", alone),
    ]  # fmt: skip
    found = _measure(sizes, True, ways, 4, o, folder)
    first, rows = found[ways[0].name], []
    for way in ways:
        mine = found[way.name]
        slowest = statistics.mean(mine["slowest"])
        differs = max(abs(a / b - 1) for a, b in zip(mine["losses"], first["losses"], strict=True))
        rows.append((
            way.name, f"{_shared(way):.0%}", *(f"{1e3 * statistics.mean(mine[name]):.0f}" for name in _TIMES),
            f"{statistics.mean(first['slowest']) / slowest:.2f}", f"{differs:.0e}",
        ))  # fmt: skip
    about = (
        f"Four ranks, a model of width {config.model.width} and {config.model.depth} blocks, clips of 1 to 60 s at 4 "
        f"frames a second (36 x 36, latents ready), {o.steps} steps of {d.slots} slots of {d.max_tokens} tokens, each "
        f"taken {o.rounds} times in turns; means, in ms. Rate: steps in the same CPU time of the slowest rank."
    )
    header = ("packs", "slots shared", "step", "CPU of all ranks", "CPU of the slowest", "rate", "loss differs by")
    return "A degree for each pack beside a fixed one", about, header, rows


def _shared(way: Way) -> float:
    """Share of the slots that are shared."""
    widths = [width for step in way.steps for _, width in spans(step, way.most)]
    return 1.0 if way.fixed > 1 else 1 - widths.count(1) / len(widths)


def mixed_sizes(o: Options, folder: Path) -> Table:
    """Balance by seconds beside balance by FLOPs."""
    config = _config([*_MIXED, *(_TINY if o.tiny else [])])
    d, n = config.data, np.arange(250 * o.steps)
    frames = 1 + 2 * below(17, 3, n) * (uniform(5, n) > 0.2)
    sides = 24 + 12 * below(3, 4, n)
    sizes = [(int(f), int(s), int(s)) for f, s in zip(frames, sides, strict=True)]
    limits = (d.slots, d.max_tokens, 1)
    by_flops = _dealt(config, sizes, range(len(sizes)), limits)[: o.steps]
    timed, error = _calibrated(config, folder, o.rounds)
    by_seconds = [_dealt(timed, sizes, _clips(step), limits, 1.0)[0] for step in by_flops]
    ways = [Way("FLOPs", by_flops), Way("measured seconds", by_seconds)]
    found = _measure(sizes, False, ways, 2, o, folder)
    each = {way.name: balance(found[way.name]["slots"]) for way in ways}
    rows = [(name, f"{statistics.mean(values):.1%}", f"{min(values):.1%}") for name, values in each.items()]
    about = (
        "Two ranks, the demo's model, images and clips of up to 33 frames in 24 x 24 to 48 x 48, encoded by the VAE in "
        f"the step, {o.steps} steps of {d.slots} slots of {d.max_tokens} tokens with the same clips, each taken "
        f"{o.rounds} times in turns. Balance: mean over max of the slots' CPU seconds in forward and backward pass, "
        f"medians of the rounds. The fit of seconds is off by {error:.1%} for a pack that was left out of it."
    )
    return "Balance of slots in measured seconds", about, ("balanced by", "balance", "lowest step"), rows


def balance(slots: list[list[list[float]]]) -> list[float]:
    """Mean over max of the slots of each step, from their seconds by round, step and slot: the medians of rounds."""
    medians = np.median(np.array(slots), axis=0)
    return [float(step.mean() / step.max()) for step in medians]


def _config(overrides: list[str]) -> Config:
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        return build(compose("train", ["run_dir=runs/slots", *overrides]), need_vae=False)


def _clips(step: list[list[int]]) -> list[int]:
    return sorted(n for slot in step for n in slot)


def _dealt(
    config: Config, sizes: Sequence[Size], clips: Sequence[int], limits: tuple[int, int, int], fill: float = _FILL
) -> Steps:
    """Steps of these clips (numbers in `sizes`); limits: slots of a step, tokens of a slot, slots of a pack."""
    cost, grid = balancing_cost(config), geometry(config)
    slots, cap, most = limits
    tokens = np.array([grid.tokens(*sizes[n]) for n in clips])
    pixels = np.array([math.prod(sizes[n]) for n in clips])
    costs, undivided = cost.of_clips(tokens, pixels), cost.undivided(tokens, pixels)
    steps = pack(tokens, costs, slots, cap, fill, 1, most=most, undivided=undivided)
    return [[[clips[n] for n in slot] for slot in step] for step in steps]


def _calibrated(config: Config, folder: Path, rounds: int) -> tuple[Config, float]:
    """The configuration with the seconds that its packs take here, and the fit's median error."""
    path = folder / "cost.json"
    result = fit(config, list(measure(config, torch.device("cpu"), rounds, latents=False)))
    path.write_text(json.dumps(as_json(config, result, "here")))
    return replace(config, data=replace(config.data, cost=str(path))), statistics.median(result.errors)


def _measure(
    sizes: list[Size], latents: bool, ways: list[Way], ranks: int, o: Options, folder: Path
) -> dict[str, dict[str, Any]]:
    """Start the ranks; returns what each way took."""
    overrides = _LONG if latents else _MIXED
    asked = Asked([*overrides, *(_TINY if o.tiny else [])], sizes, latents, ways, o.rounds, str(folder / "found.json"))
    given = folder / "asked.json"
    given.write_text(json.dumps(asdict(asked)))
    run_ranks("benchmarks.slots_worker", str(given), ranks)
    return dict(json.loads(Path(asked.out).read_text()))


if __name__ == "__main__":
    run_command(main)
