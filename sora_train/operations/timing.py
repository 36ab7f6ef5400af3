"""Time, money and failures: a step on stated hardware, and how often to save."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sora_train.config import Config, Precision
from sora_train.operations.hardware import Hardware
from sora_train.operations.trace import Trace

# Clip, Adam and EMA read and write an fp32 element's master, moments, average, gradient and temporaries this often.
_UPDATE_BYTES = 100
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
    reduced, gathered = (passes if stage >= 2 else 1), (2 * passes if stage == 3 else 1)
    travels = parameters * (reduced + gathered) + (frozen * gathered if stage == 3 else 0)
    wire = device.link if ranks <= per_node else min(device.link, device.network)
    sequence = config.parallel.sequence
    near = device.link if sequence <= per_node else min(device.link, device.network)
    exchanged = traced.exchanged * passes * share * (sequence - 1) / sequence / near
    return StepTime(
        device.seconds(traced.operations) * passes * share,
        owned * _UPDATE_BYTES / device.bandwidth,
        travels * each * (ranks - 1) / ranks / wire + exchanged,
    )


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
