"""How long a save blocks the loop, against a memory copy of the same bytes and torch's own asynchronous save.

    python -m benchmarks.save_stall [mib=256] [rounds=5]

All three save the same fp32 tensors (weights, two moments, average), in turns. The stall is the time until `save`
returns; the write that follows in the background is waited for before the next round, and not counted.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from benchmarks.report import write
from sora_train.cli import options
from sora_train.cli import run as run_command
from sora_train.training.checkpoint import KINDS, Checkpoints, Pieces
from sora_train.training.zero import connect, disconnect
from sora_train.world import World

_TENSORS = 16  # of each kind


@dataclass
class Options:
    """How much is saved, and how often."""

    mib: int = 256
    rounds: int = 5


def main() -> int:
    """Measure, print, and write the table to RESULTS.md."""
    o = options(Options, __doc__)
    numel = o.mib * 2**20 // 4 // len(KINDS) // _TENSORS
    state = {f"{kind}/{n}": torch.randn(numel) for kind in KINDS for n in range(_TENSORS)}
    copies = {key: torch.empty_like(values) for key, values in state.items()}
    connect(World())
    with tempfile.TemporaryDirectory() as folder:
        ours = Checkpoints(Path(folder) / "ours", keep=1)
        pieces: Pieces = {key: (0, values) for key, values in state.items()}

        def copy(number: int) -> Callable[[], object]:
            for key, values in state.items():
                copies[key].copy_(values)
            return lambda: None

        def save(number: int) -> Callable[[], object]:
            ours.save(number, pieces, {"step": number})
            return ours.wait

        def dcp_save(number: int) -> Callable[[], object]:
            return dcp.async_save(state, checkpoint_id=f"{folder}/dcp-{number}").result  # type: ignore[union-attr]

        ways = {"memory copy": copy, "sora_train": save, "torch DCP async_save": dcp_save}
        times: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(1, o.rounds + 2):
            for name, way in ways.items():
                began = time.perf_counter()
                finish = way(number)
                times[name].append(time.perf_counter() - began)
                finish()
    disconnect()
    base = statistics.median(times["memory copy"][1:])
    rows = []
    for name, values in times.items():
        middle = statistics.median(values[1:])
        spread = f"{min(values[1:]) * 1e3:.0f} to {max(values[1:]) * 1e3:.0f}"
        rows.append((name, f"{values[0] * 1e3:.0f} ms", f"{middle * 1e3:.0f} ms", spread, f"{middle / base:.2f}x"))
    header = ("way", "first", "median", "range, ms", "against a memory copy")
    write("Save stall", f"{o.mib} MiB of fp32 tensors on one rank, {o.rounds} rounds in turns.", header, rows)
    return 0


if __name__ == "__main__":
    run_command(main)
