"""Forecast of the time of a step on given hardware, and of the best interval between checkpoints."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sora_train.config.schema import Config, Precision
from sora_train.forecast.footprint import PERSISTENT, kept_gathered
from sora_train.forecast.hardware import Hardware
from sora_train.forecast.trace import Trace

# Bytes per element: Adam reads and writes master and two moments, and reads the gradient; an average is read and
# written, and its update reads the master.
_ADAM_BYTES, _AVERAGE_BYTES = 28, 12
_HOOK_S = 1e-4  # seconds of Python per ZeRO-3 hook; a module has four: before and after its forward and backward pass
# 419 unexpected stops in 54 days on 16,384 GPUs (Llama 3, arXiv 2407.21783, section 3.3.4).
DEVICE_HOURS_PER_FAILURE = 54 * 24 * 16384 / 419
_STAGING = 8e9  # byte/s from device to host memory, the only part of a save that training waits for


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step of one rank. Communication is assumed not to overlap with computation."""

    compute: float
    update: float
    communication: float

    @property
    def total(self) -> float:
        """Seconds of the whole step."""
        return self.compute + self.update + self.communication


def step_time(
    config: Config, parameters: int, traced: Trace, ranks: int, passes: int, stage: int, *, device: Hardware,
    per_node: int, share: float = 1.0, frozen: int = 0,
) -> StepTime:  # fmt: skip
    """Forecast the time of a step of one rank.

    Args:
        config: Configuration of the run.
        parameters: Number of trained parameters.
        traced: Trace of the heaviest pass.
        ranks: Number of ranks.
        passes: Forward passes per rank and step.
        stage: ZeRO stage.
        device: Hardware of a rank.
        per_node: Ranks per machine.
        share: Cost of a mean pass, as a share of the traced one.
        frozen: Number of frozen parameters, which are gathered but not reduced.
    """
    each = 2 if config.precision is Precision.bf16 else 4
    owned = -(-parameters // ranks) if stage else parameters
    wire = device.link if ranks <= per_node else min(device.link, device.network)
    averages = 1 + len(config.optim.ema_lengths)
    near = device.link if traced.ranks <= per_node else min(device.link, device.network)
    exchanged = traced.exchanged * passes * share * (traced.ranks - 1) / traced.ranks / near
    return StepTime(
        device.seconds(traced.operations) * passes * share,
        _moved(config, parameters, owned, passes, stage, each=each, averages=averages) / device.bandwidth,
        _exchange(
            config, parameters, frozen, passes, stage, traced, share=(ranks - 1) / ranks, wire=wire, device=device
        )
        + exchanged,
    )


def _moved(config: Config, parameters: int, owned: int, passes: int, stage: int, *, each: int, averages: int) -> float:
    """Bytes of device memory that a rank reads and writes for gradients and the update, in addition to the passes.

    Counted from the code of DeepSpeed 0.19 and of `training/engine/collectives.py`. A copy is a read and a write.
    """
    copy = 2 * each
    contiguous = config.deepspeed.get("zero_optimization", {}).get("contiguous_gradients", True)
    if stage == 0 and each == 4:
        sending, taking = copy, 0  # flattened; the optimizer reads them there
    else:
        sending = 2 * copy  # flattened, and divided by the number of ranks
        sending += copy if stage and contiguous else 0  # into the bucket
        taking = copy  # back into the gradient
        taking += copy if stage == 3 or (stage and contiguous) else 0  # out of the bucket
    times = passes if stage >= 2 else 1
    norm = 2 * 8 + each if stage == 3 else each  # ZeRO-3 computes it from a copy in fp64
    clip = 2 * 4
    cast = (copy if stage else 0) + (each + 4 if each == 2 else 0)  # gradient to fp32 for Adam
    back = 4 + each if each == 2 or stage in (1, 2) else 0  # new weights to the model's precision
    update = norm + clip + cast + _ADAM_BYTES + _AVERAGE_BYTES * averages + back
    return times * (parameters * sending + owned * taking) + owned * update


def _exchange(
    config: Config, parameters: int, frozen: int, passes: int, stage: int, traced: Trace, *, share: float,
    wire: float, device: Hardware,
) -> float:  # fmt: skip
    """Seconds of a step's collectives, and of ZeRO-3's Python hooks.

    `share` = (ranks - 1) / ranks is the share of all elements that a rank sends, `wire` the rate of its link in byte/s.
    """
    each = 2 if config.precision is Precision.bf16 else 4
    reduced, gathered = _travelling(config, parameters, frozen, passes, stage)
    if device.gloo is None:
        return (reduced + gathered) * each * share / wire
    seconds = reduced * each * share / device.gloo.reduce + gathered * each * share * device.gloo.gather_s
    if stage == 3:
        small = sum(moment.elements <= PERSISTENT for moment in traced.made)  # gathered one by one after the update
        seconds += small * (device.gloo.call_s + _HOOK_S) + 4 * traced.modules * passes * _HOOK_S
    return seconds * (share > 0)


def _travelling(config: Config, parameters: int, frozen: int, passes: int, stage: int) -> tuple[int, int]:
    """Elements that are reduced and gathered per step; an all-reduce counts twice (reduce-scatter and all-gather)."""
    if stage == 0:
        return 2 * parameters, 0
    if stage < 3:  # ZeRO-1 and 2 all-reduce buckets, although each rank keeps only a part, and gather new weights
        return 2 * parameters * (passes if stage == 2 else 1), parameters
    zero = config.deepspeed.get("zero_optimization", {})
    kept = kept_gathered(zero, parameters + frozen)
    return parameters * passes, (parameters + frozen) * passes * (1 if kept else 2)


@dataclass(frozen=True)
class SaveAdvice:
    """Interval between checkpoints that minimises the time lost to saves and to work repeated after failures."""

    checkpoint_bytes: int
    failure_every_s: float  # mean time between failures of the job
    blocked_s: float  # time that training waits for a save
    written_s: float  # time until a checkpoint is on disk, in the background
    interval_s: float
    lost: float  # share of time lost to saves and repeated work


def save_advice(parameters: int, ranks: int, disk: float, hours_per_failure: float, averages: int = 1) -> SaveAdvice:
    """Compute the best interval between checkpoints, sqrt(2 c M) - c for cost c and mean time between failures M.

    Young 1974 (doi 10.1145/361147.361115), with the correction of Daly 2006; never shorter than a write.

    Args:
        parameters: Number of trained parameters. A checkpoint holds fp32 master weights, two moments and the averages.
        ranks: Number of ranks.
        disk: Rate at which all ranks together write, byte/s.
        hours_per_failure: Mean time between failures of one rank, hours.
        averages: Number of averages of the weights.
    """
    size = (12 + 4 * averages) * parameters
    blocked, written = size / ranks / _STAGING, size / disk
    failure = hours_per_failure * 3600 / ranks
    interval = max(math.sqrt(2 * blocked * failure) - blocked, written, 1.0)
    lost = blocked / interval + (interval / 2 + written) / failure
    return SaveAdvice(size, failure, blocked, written, interval, lost)
