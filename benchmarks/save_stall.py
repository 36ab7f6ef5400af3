"""Time for which a save blocks the loop, against a memory copy of the bytes, torch's asynchronous save and DeepSpeed's.

    python -m benchmarks.save_stall [mib=256] [rounds=5]

The first three save the same fp32 tensors (weights, two moments, average), in turns with DeepSpeed's `save_checkpoint`,
which writes as many bytes (weights twice, two moments, of a network as large). The stall is the time until the call
returns; what follows in the background is waited for before the next round, and not counted. Ours copies in the
background too, as nothing of it changes before the next optimizer step: its stall is the call, and what `settle` still
waits for after some matrix products in place of forward and backward; how long those took alone and beside a save is
told. A second line has it with nothing in between.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from benchmarks.report import write
from sora_train.config.schema import Config
from sora_train.core.cli import run as run_command
from sora_train.core.options import options
from sora_train.core.world import World
from sora_train.training.engine.process_group import connect, disconnect
from sora_train.training.engine.zero import Engine
from sora_train.training.state.checkpoint import Checkpoints
from sora_train.training.state.checkpoint_format import Pieces

KINDS = ("master", "exp_avg", "exp_avg_sq", "ema")
_TENSORS = 16  # of each kind
_PRODUCTS = 12  # of 1024 x 1024, in place of a step: a few tenths of a second
Finish = Callable[[], object]  # waits for what follows in the background
Way = Callable[[int], tuple[float, Finish]]  # number of the round: seconds that the loop was blocked


@dataclass
class Options:
    """Options: bytes to save, and repeats."""

    mib: int = 256
    rounds: int = 5


def main() -> int:
    """Measure, print, and write the table to docs/results.md."""
    o = options(Options, __doc__)
    numel = o.mib * 2**20 // 4 // len(KINDS) // _TENSORS
    state = {f"{kind}/{n}": torch.randn(numel) for kind in KINDS for n in range(_TENSORS)}
    connect(World())
    steps: list[tuple[float, float]] = []  # seconds alone and beside a save
    with tempfile.TemporaryDirectory() as folder:
        ways = _ways(state, Path(folder), _engine(numel), steps)
        times: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(1, o.rounds + 2):
            for name, way in ways.items():
                stall, finish = way(number)
                times[name].append(stall)
                finish()
    disconnect()
    base = statistics.median(times["memory copy"][1:])
    rows = []
    for name, values in times.items():
        middle = statistics.median(values[1:])
        spread = f"{min(values[1:]) * 1e3:.1f} to {max(values[1:]) * 1e3:.1f}"
        rows.append((name, f"{values[0] * 1e3:.0f} ms", f"{middle * 1e3:.1f} ms", spread, f"{middle / base:.2f}x"))
    header = ("way", "first", "median", "range, ms", "against a memory copy")
    alone, beside = (statistics.median(column) * 1e3 for column in zip(*steps[1:], strict=True))
    about = (
        f"{o.mib} MiB of fp32 tensors on one rank, {o.rounds} rounds in turns. A step of {alone:.0f} ms took "
        f"{beside:.0f} ms beside copy, hash and write (medians)."
    )
    write("Save stall", about, header, rows)
    return 0


def _ways(
    state: dict[str, torch.Tensor], folder: Path, engine: Engine, steps: list[tuple[float, float]]
) -> dict[str, Way]:
    """The ways to save that are compared. `steps` takes how long a step took alone, and beside our save."""
    copies = {key: torch.empty_like(values) for key, values in state.items()}
    ours = Checkpoints(folder / "ours", keep=1)
    pieces: Pieces = {key: (0, values) for key, values in state.items()}
    work = torch.randn(1024, 1024)

    def copy(number: int) -> tuple[float, Finish]:
        began = time.perf_counter()
        for key, values in state.items():
            copies[key].copy_(values)
        return time.perf_counter() - began, lambda: None

    def in_a_step(number: int) -> tuple[float, Finish]:
        alone = _products(work)
        called = _timed(lambda: ours.save(2 * number, pieces, {"step": 2 * number}))
        steps.append((alone, _products(work)))
        return called + _timed(ours.settle), ours.wait

    def at_once(number: int) -> tuple[float, Finish]:
        began = time.perf_counter()
        ours.save(2 * number + 1, pieces, {"step": 2 * number + 1})
        ours.settle()
        return time.perf_counter() - began, ours.wait

    def dcp_save(number: int) -> tuple[float, Finish]:
        shutil.rmtree(folder / f"dcp-{number - 1}", ignore_errors=True)
        began = time.perf_counter()
        future = dcp.async_save(state, checkpoint_id=folder / f"dcp-{number}")
        return time.perf_counter() - began, future.result  # type: ignore[union-attr]

    def deepspeed_save(number: int) -> tuple[float, Finish]:
        return _timed(lambda: engine.engine.save_checkpoint(str(folder / "deepspeed"), tag="saved")), lambda: None

    return {
        "memory copy": copy, "sora_train, in a step": in_a_step, "sora_train, no step in between": at_once,
        "torch DCP async_save": dcp_save, "DeepSpeed save_checkpoint": deepspeed_save,
    }  # fmt: skip


def _timed(act: Callable[[], object]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def _products(work: torch.Tensor) -> float:
    """Do the work of a step; the seconds it took."""
    return _timed(lambda: [torch.mm(work, work) for _ in range(_PRODUCTS)])


def _engine(numel: int) -> Engine:
    """A network whose weights, master weights and moments take as many bytes as what the others save."""
    network = nn.Module()
    for n in range(_TENSORS):
        network.register_parameter(f"p{n}", nn.Parameter(torch.randn(numel)))
    optimizer = torch.optim.AdamW(network.parameters())
    optimizer.param_groups[0]["base_lr"] = 1e-3
    config = Config("x", steps=1, deepspeed={"zero_optimization": {"stage": 1}})
    return Engine("net", network, optimizer, 1, config)


if __name__ == "__main__":
    run_command(main)
