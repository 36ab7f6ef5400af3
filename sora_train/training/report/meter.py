"""Metrics of a run (loss by noise level and task, speed, MFU, packing), accumulated between two logged steps."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sora_train.config.schema import TASKS
from sora_train.core.batch import Pack
from sora_train.core.cost import AdapterCost, Cost, Geometry
from sora_train.core.loss import LEVELS, Loss

PEAK_TFLOPS = {  # dense bf16, from the makers' data sheets
    "H200": 989.0, "H100 PCIe": 756.0, "H100": 989.0, "B200": 2250.0, "GB200": 2250.0, "A100": 312.0, "L40S": 362.0,
    "RTX 4090": 165.0,
}  # fmt: skip


def peak_flops(device: torch.device, setting_tflops: float | None) -> float:
    """Peak FLOP/s of one rank's device, the denominator of MFU.

    `setting_tflops` (TFLOP/s) takes precedence. Otherwise a GPU has its published dense bf16 peak (NaN for an unknown
    model), and a CPU the best rate of a few 1024 x 1024 matrix products.
    """
    if setting_tflops is not None:
        return setting_tflops * 1e12
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return next((tflops * 1e12 for known, tflops in PEAK_TFLOPS.items() if known in name), float("nan"))
    a, best, size = torch.randn(1024, 1024), 0.0, 1024
    for _ in range(6):
        start = time.perf_counter()
        a @ a
        best = max(best, 2.0 * size**3 / (time.perf_counter() - start))
    return best


@dataclass
class Totals:
    """Counters since the start of the run, saved in checkpoints."""

    samples: int = 0
    tokens: int = 0
    skipped_samples: int = 0
    skipped_steps: int = 0
    productive_s: float = 0.0  # seconds of training steps, without waiting for data
    wall_s: float = 0.0  # seconds of the whole run


class Meter:
    """Accumulates metrics on the device and the host; they are reduced over ranks when they are read.

    Args:
        geometry: Pixels per token.
        cost: FLOPs of training.
        device: Device of the losses.
        peak: Peak FLOP/s of a rank's device.
        capacity: Largest number of tokens in a step, over all ranks.
    """

    def __init__(
        self, geometry: Geometry, cost: Cost | AdapterCost, device: torch.device, peak: float, capacity: int
    ) -> None:
        self.geometry, self.cost, self.device, self.peak = geometry, cost, device, peak
        self.capacity = capacity
        self.totals = Totals()
        self._flops = self._step_flops = self._tokens = self._steps = 0
        self._data_wait = 0.0
        self._step_loads: list[int] = []
        self._loss: Tensor
        self._levels: Tensor
        self._tasks: Tensor
        self._terms: dict[str, Tensor]
        self.start()

    def restore(self, totals: dict[str, Any]) -> None:
        """Restore the counters from a checkpoint."""
        self.totals = Totals(**totals)

    def tokens(self, pack: Pack) -> int:
        """Number of tokens of a pack."""
        return sum(self.geometry.tokens(*clip.visit.size) for clip in pack.clips)

    def about(self, sizes: Sequence[tuple[int, int, int]]) -> str:
        """Describe a pack for messages, from the sizes (frames, height, width) of its clips."""
        if not sizes:
            return "an empty pack"
        tokens = [self.geometry.tokens(*size) for size in sizes]
        frames, height, width = sizes[tokens.index(max(tokens))]
        return f"a pack of {sum(tokens):,} tokens, {len(sizes)} clip(s), the largest {frames} x {height} x {width}"

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Context in which time counts as waiting for data."""
        start = time.monotonic()
        yield
        self._data_wait += time.monotonic() - start

    def add(self, losses: Sequence[tuple[Pack, Loss]], weight: float) -> None:
        """Count packs and their losses. `weight` is the step's loss weight; losses stay on the device.

        Each of n ranks that share a pack has the complete loss, and counts an n-th of it.
        """
        for pack, loss in losses:
            place, ranks = pack.part
            lengths = [self.geometry.tokens(*clip.visit.size) for clip in pack.clips]
            flops = self.cost.training(lengths, loss.texts if pack.clips else None) // ranks
            self._flops += flops
            self._step_flops += flops
            self._tokens += sum(lengths) if place == 0 else 0
            self._loss = self._loss + loss.sum.detach().double() / (weight * ranks)
            if loss.level_sum is not None and loss.level_weight is not None:
                self._levels = self._levels + torch.stack((loss.level_sum, loss.level_weight)).double() / ranks
            if loss.by_task is not None:
                self._tasks = self._tasks + loss.by_task.double() / ranks
            for name, term in loss.terms.items():
                self._terms[name] = self._terms.get(name, 0) + term.detach().double() / (weight * ranks)

    def step_done(self, samples: int, tokens: int, refused: int, applied: bool) -> None:
        """Finish a step. Samples, tokens and refused samples are sums over all ranks."""
        self._steps += 1
        self.totals.samples += samples
        self.totals.tokens += tokens
        self._step_loads.append(self._step_flops)
        self._step_flops = 0
        self.totals.skipped_samples += refused
        self.totals.skipped_steps += not applied

    def read(self) -> dict[str, float]:
        """Compute the metrics since the last read, the same on every rank. Collective; waits for the device."""
        seconds = time.monotonic() - self._started
        loads = torch.tensor(self._step_loads, dtype=torch.float64)
        peak_loads = loads.clone()
        dist.all_reduce(peak_loads, op=dist.ReduceOp.MAX)
        host = torch.tensor([self._tokens, self._flops, self._data_wait], dtype=torch.float64)
        terms = [self._terms[name].view(1) for name in sorted(self._terms)]
        device = torch.cat((self._loss.view(1), *terms, self._levels.flatten(), self._tasks.flatten())).cpu()
        both = torch.cat((host, loads, device))
        dist.all_reduce(both)
        ranks = dist.get_world_size()
        tokens, flops, wait = both[:3].tolist()
        balance = (both[3 : 3 + len(loads)] / ranks / peak_loads.clamp(min=1)).mean().item()
        sizes = (1, len(terms), self._levels.numel(), self._tasks.numel())
        losses, shares, *parts = (both[3 + len(loads) :]).split(sizes)
        levels, tasks = (part.view(2, -1) for part in parts)
        self.totals.wall_s += seconds
        self.totals.productive_s += max(0.0, seconds - wait / ranks)
        figures = {
            "loss": losses.item() / self._steps,
            "samples": self.totals.samples,
            "tokens": self.totals.tokens,
            "tokens_per_s": tokens / seconds,
            "step_time": seconds / self._steps,
            "data_wait": wait / ranks / seconds,
            "mfu": flops / seconds / ranks / self.peak,
            "fill": tokens / (self.capacity * self._steps),
            "balance": balance,
            "goodput": self.totals.productive_s / self.totals.wall_s,
            "skipped_samples": self.totals.skipped_samples,
            "skipped_steps": self.totals.skipped_steps,
        }
        for name, share in zip(sorted(self._terms), shares.tolist(), strict=True):
            figures[f"loss_term/{name}"] = share / self._steps
        for level, (total, weight) in enumerate(levels.T.tolist()):
            if weight:
                figures[f"loss_by_noise/{level / levels.shape[1]:.1f}"] = total / weight
        for task, (total, weight) in zip(TASKS, tasks.T.tolist(), strict=True):
            if weight:
                figures[f"loss_by_task/{task}"] = total / weight
        if self.device.type == "cuda":
            figures["memory_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        self.start()
        return figures

    @contextmanager
    def overhead(self) -> Iterator[None]:
        """Context of work that isn't training (validation, samples, checkpoints): lowers goodput, but not speed."""
        start = time.monotonic()
        yield
        spent = time.monotonic() - start
        self.totals.wall_s += spent
        self._started += spent

    def start(self) -> None:
        """Start an interval: clear everything but the totals."""
        self._started = time.monotonic()
        self._tokens = self._steps = 0
        self._flops = self._step_flops = 0
        self._data_wait = 0.0
        self._step_loads = []
        self._loss = torch.zeros((), dtype=torch.float64, device=self.device)
        self._levels = torch.zeros(2, LEVELS, dtype=torch.float64, device=self.device)
        self._tasks = torch.zeros(2, len(TASKS), dtype=torch.float64, device=self.device)
        self._terms = {}
