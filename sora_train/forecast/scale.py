"""Forecast of a run on many ranks: collectives by alpha-beta models, the agreement, saves and reads, and goodput.

The time of a collective is the sum of a constant (call), a latency for each sequential message (alpha) and a time for
each byte that a rank sends (beta). Thakur et al. 2005 (doi 10.1177/1094342005051521) has the counts by algorithm. For
NCCL the values are those by which it chooses its algorithms itself (`src/graph/tuning.cc`, protocol Simple).
benchmarks/collectives.py fits gloo's values to two and three ranks, and compares their prediction for four ranks with
measurements.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich.box import SIMPLE
from rich.table import Table
from scipy.optimize import nnls

from sora_train.config.deepspeed_keys import BUCKET
from sora_train.config.schema import Config, Precision
from sora_train.forecast.estimate import Estimate
from sora_train.forecast.footprint import kept_gathered, stage_of
from sora_train.forecast.hardware import Hardware
from sora_train.forecast.timing import save_advice, step_time
from sora_train.forecast.trace import Trace
from sora_train.training.report.console import duration

RANKS = (64, 256, 1024, 4096, 16384)
_CALL_S = 8.4e-6  # NCCL's constant for a collective
_NEAR_S, _FAR_S = 3.4e-6, 14e-6  # NCCL's latency of a message in a ring: over NVLink, over the network
_HOST_S = 3e-5  # assumed: a message between hosts over TCP, as gloo sends it
_GROUPS = 4  # parameter groups; ZeRO-1 and 2 gather their new weights group by group
_START_S = 120.0  # assumed: from a failure to the first new step, without reading the checkpoint
_ELEMENTS = {0: 500_000_000, 3: 50_000_000}  # DeepSpeed's defaults: elements of a bucket; of a prefetch at stage 3


@dataclass(frozen=True)
class AlphaBeta:
    """Alpha-beta model of collectives between ranks, in seconds."""

    call: float  # constant of a collective
    alpha: float  # latency of a message
    beta: float  # time of a byte

    def all_reduce(self, nbytes: float, ranks: int) -> float:
        """Seconds of a ring all-reduce."""
        return 2 * self.gather(nbytes, ranks) - self.call

    def gather(self, nbytes: float, ranks: int) -> float:
        """Seconds of a ring all-gather to, or reduce-scatter of, `nbytes` bytes in all."""
        return self.call + (ranks - 1) * self.alpha + nbytes * (ranks - 1) / ranks * self.beta


def fit(measured: Sequence[tuple[int, float, float]], times: int) -> AlphaBeta:
    """Fit the three values by non-negative least squares on relative errors.

    Args:
        measured: (ranks, bytes, seconds) of each measured collective.
        times: Ring passes of a collective: 2 for all-reduces, 1 for all-gathers.
    """
    rows = np.array([[1 / s, times * (r - 1) / s, times * n * (r - 1) / r / s] for r, n, s in measured])
    scale = rows.max(0)
    return AlphaBeta(*(nnls(rows / scale, np.ones(len(rows)))[0] / scale).tolist())


@dataclass(frozen=True)
class Scale:
    """Figures of a run on a number of ranks; times in seconds."""

    ranks: int
    step: float
    collectives: float  # of a step
    waiting: float  # the part of `collectives` that is latency of sequential messages; it grows with the ranks
    efficiency: float  # share of a step spent on computation
    ring: float  # agreement of a step by a ring, as in gloo; hidden if shorter than a step
    tree: float  # agreement of a step by a tree
    written: float  # writing a checkpoint in the background, or reading it at a start
    failure_every: float
    goodput: float  # share of the time whose work isn't lost


def waiting(config: Config, parameters: int, passes: int, stage: int, ranks: int, per_node: int) -> float:
    """Total latency of the sequential messages of a step's collectives, in seconds, for rings over all ranks."""
    each = 2 if config.precision is Precision.bf16 else 4
    zero = config.deepspeed.get("zero_optimization", {})
    bucket = int(zero.get("reduce_bucket_size", _ELEMENTS[0])) if stage or each == 2 else BUCKET // each
    reduced = -(-parameters // bucket) * (passes if stage >= 2 else 1)
    gathered = {0: 0, 1: _GROUPS, 2: _GROUPS}.get(stage, 0)
    if stage == 3:
        fetched = -(-parameters // int(zero.get("stage3_prefetch_bucket_size", _ELEMENTS[3])))
        gathered = fetched * passes * (1 if kept_gathered(zero, parameters) else 2)
    machines = -(-ranks // per_node)
    once = _CALL_S + (ranks - machines) * _NEAR_S + (machines - 1) * _FAR_S
    rings = reduced * (1 if stage == 3 else 2) + gathered + 2  # 2 for the all-reduce of the gradient norm
    return rings * once


def scaled(
    config: Config, figures: Estimate, traced: Trace, share: float, device: Hardware, per_node: int, *, disk: float,
    hours_per_failure: float,
) -> list[Scale]:  # fmt: skip
    """Forecast the run on each number of `RANKS`, with the same work per rank (weak scaling).

    See `step_time` and `save_advice` for the arguments.
    """
    parameters, found = figures.parameters - figures.frozen, []
    for ranks in RANKS:
        time = step_time(
            config, parameters, traced, ranks, figures.passes, stage_of(config), device=device, per_node=per_node,
            share=share, frozen=figures.frozen,
        )  # fmt: skip
        waits = waiting(config, parameters, figures.passes, stage_of(config), ranks, per_node)
        save = save_advice(parameters, ranks, disk, hours_per_failure, 1 + len(config.optim.ema_lengths))
        step = time.total + waits
        lost = save.lost + (_START_S + save.written_s) / save.failure_every_s
        hops = math.ceil(math.log2(ranks))
        found.append(
            Scale(
                ranks, step, time.communication + waits, waits, (time.compute + time.update) / step,
                2 * (ranks - 1) * _HOST_S, 2 * hops * _HOST_S, save.written_s, save.failure_every_s,
                max(0.0, 1.0 - lost),
            )
        )  # fmt: skip
    return found


def table(rows: Sequence[Scale], device: Hardware) -> Table:
    """Table of a forecast, with a row for each number of ranks."""
    title = (
        f"on more ranks of {device.name}, each with as much work: a step, its collectives as rings, the part that "
        "waits for other messages, the share that computes, the agreement as a ring and as a tree in ms, a checkpoint "
        "to or from disk; else in seconds"
    )
    found = Table(title=title, box=SIMPLE, padding=(0, 1, 0, 0))
    heads = ("ranks", "step", "comm.", "waits", "busy", "agree", "tree", "disk", "fails", "goodput")
    for head in heads:
        found.add_column(head, justify="right", no_wrap=True)
    for s in rows:
        found.add_row(
            f"{s.ranks:,}", *(f"{x:.2g}" for x in (s.step, s.collectives, s.waiting)), f"{s.efficiency:.0%}",
            f"{1e3 * s.ring:.0f}", f"{1e3 * s.tree:.1f}", f"{s.written:.0f}", duration(s.failure_every),
            f"{s.goodput:.1%}",
        )  # fmt: skip
    return found
