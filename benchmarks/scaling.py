"""Scaling over ranks: a step on 1, 2 and 4 ranks, by ZeRO stage, beside torch's DDP and FSDP2 on the same packs.

    python -m benchmarks.scaling [ranks=[1,2,4]] [precisions=[fp32,bf16]] [steps=[small,large]] [rounds=5] [tiny=true]

All ways are built in the same processes and take the same packs in turns: forward, backward, clipping and AdamW over
latents that are ready, ours with the trainer's agreement on the host. Every rank has packs of the same sizes, so
efficiency is a step's time on one rank divided by that on several. Medians of all rounds; of the ranks the slowest.
Where other processes compete for the cores only the CPU seconds mean something: what a rank spends beyond a rank alone.
A second table divides a profiled step of the most ranks up to 2 by what the time goes into. `tiny=true` tries it all on
a small network and writes nothing.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.ranks import run_ranks
from benchmarks.report import write
from benchmarks.scaling_worker import Asked
from sora_train.core.cli import InputError
from sora_train.core.cli import run as run_command
from sora_train.core.options import number, options

WAYS = ("zero0", "zero1", "zero2", "zero3", "ddp", "fsdp2")
_SIZES = {  # network, frames of each clip, pixels of a frame
    "small": (["model=demo"], [9] * 9, 48 * 48),
    "large": (["model=20m", "data.max_tokens=8192"], [9, 9, 1], 64 * 64),
}
_TINY = (["model.width=32", "model.heads=2", "model.ffn=64", "model.depth=2"], [5, 1], 24 * 24)
_STEPS = 3  # of each way in a round


@dataclass
class Options:
    """The measurements to take."""

    ranks: list[int] = field(default_factory=lambda: [1, 2, 4])
    precisions: list[str] = field(default_factory=lambda: ["fp32", "bf16"])
    steps: list[str] = field(default_factory=lambda: ["small", "large"])
    ways: list[str] = field(default_factory=lambda: list(WAYS))
    rounds: int = number(5, least=1)
    tiny: bool = False


@dataclass(frozen=True)
class Case:
    """One start of ranks."""

    step: str
    precision: str
    ranks: int

    def asked(self, o: Options, out: Path) -> Asked:
        """The measurements that its ranks take."""
        overrides, clips, pixels = _TINY if o.tiny else _SIZES[self.step]
        chosen = [*overrides, f"precision={self.precision}"]
        return Asked(chosen, list(o.ways), clips, pixels, o.rounds, 1 if o.tiny else _STEPS, str(out))


Found = dict[Case, dict[str, dict[str, Any]]]


def main() -> int:
    """Measure, print, and write the tables to docs/results.md."""
    o = options(Options, __doc__)
    if wrong := [*(set(o.ways) - set(WAYS)), *(set(o.steps) - set(_SIZES))]:
        raise InputError(f"ways and steps are of {', '.join((*WAYS, *_SIZES))}, not {wrong[0]}")
    found = {case: measure(case, o) for case in cases(o)}
    speed, parts = speed_rows(found), part_rows(found)
    if o.tiny:
        for row in (*speed, *parts):
            print(" | ".join(row))
        return 0
    about = f"Medians of {o.rounds * _STEPS} steps in turns, one thread a rank; {len(os.sched_getaffinity(0))} cores."
    write("Scaling over ranks", about, SPEED_HEADER, speed)
    write("Where a step's time goes", "One profiled step of rank 0; ms.", PART_HEADER, parts)
    return 0


def cases(o: Options) -> Iterator[Case]:
    """All starts, the fewest ranks first."""
    for step in o.steps if not o.tiny else o.steps[:1]:
        for precision in o.precisions:
            for ranks in sorted(o.ranks):
                yield Case(step, precision, ranks)


def measure(case: Case, o: Options) -> dict[str, dict[str, Any]]:
    """Start the ranks of a case; returns what each way took."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        run_ranks("benchmarks.scaling_worker", json.dumps(asdict(case.asked(o, out))), case.ranks)
        return dict(json.loads(out.read_text()))


SPEED_HEADER = (
    "step", "ranks", "way", "ms", "efficiency", "CPU ms of a rank", "beyond a rank alone", "collectives", "MiB sent",
    "of the least",
)  # fmt: skip


def speed_rows(found: Found) -> list[tuple[str, ...]]:
    """Time of a step, efficiency and collectives of every case and way."""
    rows = []
    for case, ways in found.items():
        alone = found.get(Case(case.step, case.precision, 1), {})
        for way, values in ways.items():
            wall = statistics.median(values["seconds"])
            cpu = statistics.median(values["cpu_seconds"]) / case.ranks
            parts, one = values["parts"], alone.get(way)
            share, more = "", ""
            if one and case.ranks > 1:
                share = f"{statistics.median(one['seconds']) / wall:.0%}"
                more = f"{cpu / statistics.median(one['cpu_seconds']) - 1:+.0%}"
            least = least_bytes(way, values["bytes"], case.ranks)
            sent = f"{parts['sent'] / 2**20:.1f}" if case.ranks > 1 else ""
            ratio = f"{parts['sent'] / least:.2f}" if least else ""
            calls = str(sum(parts["calls"].values())) if case.ranks > 1 else ""
            name, times = f"{case.step}, {case.precision}", (f"{wall * 1e3:.1f}", share, f"{cpu * 1e3:.1f}", more)
            rows.append((name, str(case.ranks), way, *times, calls, sent, ratio))
    return rows


def least_bytes(way: str, weights: float, ranks: int) -> float:
    """Bytes that a rank must send in a step: gradients to where they are summed, and what comes of them back.

    Where weights are gathered for use (ZeRO-3, FSDP) forward and backward pass each need them. `weights` is the bytes
    of all trained weights in the precision of the pass.
    """
    return (3 if way in ("zero3", "fsdp2") else 2) * weights * (ranks - 1) / ranks


_PARTS = ("products", "attention", "elementwise", "update", "waiting for collectives", "host")
PART_HEADER = ("step", "ranks", "way", *_PARTS, "collectives under way")


def part_rows(found: Found) -> list[tuple[str, ...]]:
    """Parts of the time of a step, for the most ranks up to two."""
    shown = max((case.ranks for case in found if case.ranks <= 2), default=max(case.ranks for case in found))
    rows = []
    for case, ways in found.items():
        for way, values in ways.items() if case.ranks == shown else ():
            parts = values["parts"]
            times = [f"{1e3 * parts['seconds'][name]:.1f}" for name in _PARTS]
            under_way = ", ".join(f"{kind} {1e3 * s:.1f}" for kind, s in parts["collective_s"].items())
            rows.append((f"{case.step}, {case.precision}", str(case.ranks), way, *times, under_way))
    return rows


if __name__ == "__main__":
    run_command(main)
