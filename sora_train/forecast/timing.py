"""Time, money and failures: a step on stated hardware, and how often to save."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sora_train.config.schema import Config, Precision
from sora_train.forecast.footprint import PERSISTENT, kept_gathered
from sora_train.forecast.hardware import Hardware
from sora_train.forecast.trace import Trace

# Adam reads and writes an fp32 element's master and two moments and reads its gradient; an average is read and written.
_ADAM_BYTES, _AVERAGE_BYTES = 28, 12
_HOOK_S = 1e-4  # of Python, each time that ZeRO-3 looks after a module: before and after it, forwards and backwards
# 419 unexpected stops in 54 days on 16,384 GPUs (Llama 3, arXiv 2407.21783, section 3.3.4).
DEVICE_HOURS_PER_FAILURE = 54 * 24 * 16384 / 419
_STAGING = 8e9  # byte/s from device to host memory, which is all that training waits for


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step of one rank. Communication isn't taken to overlap with anything."""

    compute: float
    update: float
    communication: float

    @property
    def total(self) -> float:
        """The whole step."""
        return self.compute + self.update + self.communication


def step_time(
    config: Config, parameters: int, traced: Trace, ranks: int, passes: int, stage: int, device: Hardware,
    per_node: int, share: float = 1.0, frozen: int = 0,
) -> StepTime:  # fmt: skip
    """Time of a step whose passes cost `share` of the traced one; `frozen` parameters are only gathered."""
    each = 2 if config.precision is Precision.bf16 else 4
    owned = -(-parameters // ranks) if stage else parameters
    wire = device.link if ranks <= per_node else min(device.link, device.network)
    averages = 1 + len(config.optim.ema_lengths)
    sequence = config.parallel.sequence
    near = device.link if sequence <= per_node else min(device.link, device.network)
    exchanged = traced.exchanged * passes * share * (sequence - 1) / sequence / near
    return StepTime(
        device.seconds(traced.operations) * passes * share,
        _moved(config, parameters, owned, passes, stage, each, averages) / device.bandwidth,
        _exchange(config, parameters, frozen, passes, stage, traced, (ranks - 1) / ranks, wire, device) + exchanged,
    )


def _moved(config: Config, parameters: int, owned: int, passes: int, stage: int, each: int, averages: int) -> float:
    """Bytes of its own memory that a rank reads and writes for the gradients and the update beside the passes.

    Counted in DeepSpeed 0.19's code, like `footprint.py`: a copy is a read and a write.
    """
    copy = 2 * each
    contiguous = config.deepspeed.get("zero_optimization", {}).get("contiguous_gradients", True)
    sending = 2 * copy  # copied together, and divided by the number of ranks
    sending += copy if stage and contiguous else 0  # into the bucket
    taking = copy  # back into the gradient
    taking += copy if stage == 3 or (stage and contiguous) else 0  # out of the bucket
    times = passes if stage >= 2 else 1
    norm = 2 * 8 + each if stage else each  # ZeRO takes it of a copy in fp64
    norm += 2 * each if each == 2 and stage in (1, 2) else 0  # and bf16 is looked through for what isn't finite
    clip = 2 * 4
    cast = (copy if stage else 0) + (each + 4 if each == 2 else 0)  # the gradient as Adam wants it
    back = 4 + each if each == 2 or stage in (1, 2) else 0  # the new weights as the model wants them
    update = norm + clip + cast + _ADAM_BYTES + _AVERAGE_BYTES * averages + back
    return times * (parameters * sending + owned * taking) + owned * update


def _exchange(
    config: Config, parameters: int, frozen: int, passes: int, stage: int, traced: Trace, share: float, wire: float,
    device: Hardware,
) -> float:  # fmt: skip
    """Seconds of the collectives: what a rank sends (a share of all), and at ZeRO-3 the Python around them."""
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
    """Elements that are reduced and gathered, as shares (ranks - 1) / ranks of all: an all-reduce counts twice."""
    if stage == 0:
        return 2 * parameters, 0
    if stage < 3:  # ZeRO-1 and 2 all-reduce a bucket although each rank keeps its part of it, then gather new weights
        return 2 * parameters * (passes if stage == 2 else 1), parameters
    zero = config.deepspeed.get("zero_optimization", {})
    kept = kept_gathered(zero, parameters + frozen)
    return parameters * passes, (parameters + frozen) * passes * (1 if kept else 2)


@dataclass(frozen=True)
class SaveAdvice:
    """How often to save, so that time spent on saves and work lost to failures together are least."""

    checkpoint_bytes: int
    failure_every_s: float
    blocked_s: float  # what training waits for
    written_s: float  # until it is on disk, in the background
    interval_s: float
    lost: float  # share of the time, saves and repeated work together


def save_advice(parameters: int, ranks: int, disk: float, hours_per_failure: float, averages: int = 1) -> SaveAdvice:
    """The interval of Young 1974 (doi 10.1145/361147.361115), corrected by Daly 2006: sqrt(2 c M) - c for cost c, mean
    time between failures M; never shorter than a write. `disk` is byte/s of all ranks together.

    Checkpoints hold fp32 masters, two moments and `averages` of the weights: with one, 16 bytes a parameter.
    """
    size = (12 + 4 * averages) * parameters
    blocked, written = size / ranks / _STAGING, size / disk
    failure = hours_per_failure * 3600 / ranks
    interval = max(math.sqrt(2 * blocked * failure) - blocked, written, 1.0)
    lost = blocked / interval + (interval / 2 + written) / failure
    return SaveAdvice(size, failure, blocked, written, interval, lost)
