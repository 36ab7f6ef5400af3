"""Forecast of the device memory of one rank: model states, and the peak of what a step adds to them.

Model states follow Rajbhandari et al. 2020, "ZeRO" (arXiv 1910.02054, section 3). The rest follows the allocations of
DeepSpeed 0.19 in their order (`runtime/zero/stage_1_and_2.py`, `stage3.py`; without ZeRO `runtime/engine.py` and
`runtime/fp16/unfused_optimizer.py`). benchmarks/plan_accuracy.py compares it with real runs.

Without overlap, ZeRO-1 reduces gradients after the backward pass, so all of them are alive at its end; ZeRO-2 and 3
reduce them as buckets fill. To reduce a bucket, its gradients are copied into one tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sora_train.config.deepspeed_keys import BUCKET
from sora_train.config.schema import Config, Precision
from sora_train.forecast.trace import Trace

_BUCKET = 500_000_000  # elements, DeepSpeed's default
_LIVE = 1_000_000_000  # elements that ZeRO-3 keeps gathered, DeepSpeed's default
_PREFETCH = 50_000_000  # elements that ZeRO-3 gathers at once, DeepSpeed's default
_REUSE = 1_000_000_000  # ZeRO-3 keeps a weight if at most so many elements are used until its next use (default)
PERSISTENT = 100_000  # size of a parameter up to which ZeRO-3 keeps it gathered, DeepSpeed's default


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank. `backward` and `update` are the peaks that the two halves of a step add to the states."""

    weights: int
    gradients: int
    optimizer: int  # fp32 masters and Adam's two moments
    ema: int
    encoder: int  # weights of the frozen VAE
    activations: int
    bucket: int  # gradients being reduced, and gathered weights at stage 3
    backward: int
    update: int

    @property
    def states(self) -> int:
        """Bytes that are alive during the whole run."""
        return self.weights + self.optimizer + self.ema + self.encoder

    @property
    def peak(self) -> int:
        """Peak of all bytes."""
        return self.states + max(self.backward, self.update)


@dataclass(frozen=True)
class _Sizes:
    """Bytes from which the peaks of every stage are computed."""

    each: int  # of one weight, and of one gradient
    all: int  # of the gradients of all parameters
    own: int  # of this rank's part of the gradients
    master: int  # of this rank's part of the gradients in fp32
    passes: int
    trace: Trace
    ranks: int
    gloo: bool

    @property
    def cast(self) -> int:
        """Bytes of the flattened copy of this rank's gradients and, in bf16, of its cast to fp32 for Adam."""
        return self.own + (self.master if self.each == 2 else 0)

    def scratch(self, gathered: int) -> int:
        """Bytes of temporary copies that gloo makes while it gathers `gathered` bytes; none for nccl."""
        return gathered + gathered // self.ranks if self.gloo else 0

    @property
    def activations(self) -> int:
        """Peak bytes of a pass without gradients of weights."""
        return max(self.trace.activations, self.trace.encoder)

    @property
    def accumulating(self) -> int:
        """Peak bytes of a pass, from its first gradient on, if all gradients stay alive."""
        most = earlier = 0
        for moment in self.trace.made:
            most = max(most, moment.most + earlier)
            earlier += moment.elements * self.each
        return max(most, self.all)

    def sending(self, bucket: int, waits: bool, keeps: bool) -> int:
        """Peak bytes of a pass that reduces gradients, in a copy, as soon as there are `bucket` bytes of them.

        Args:
            bucket: Bytes of a bucket.
            waits: Count the gradients that wait for their bucket to fill.
            keeps: Count this rank's part of the gradients that were reduced.
        """
        most = waiting = kept = now = 0
        for moment in self.trace.made:
            size, now = moment.elements * self.each, moment.now
            if waiting and waiting + size > bucket:
                most = max(most, now + kept + waits * waiting + waiting)
                kept += keeps * waiting * self.own // self.all
                waiting = 0
            most = max(most, moment.most + kept + waits * waiting)
            waiting += size
        return max(most, now + kept + waits * waiting + waiting)


def stage_of(config: Config) -> int:
    """ZeRO stage of a configuration."""
    return int(config.deepspeed.get("zero_optimization", {}).get("stage", 0))


def memory(
    config: Config, parameters: int, traced: Trace, ranks: int, passes: int, stage: int, *, frozen: int = 0,
    gloo: bool = False,
) -> Memory:  # fmt: skip
    """Forecast the memory of one rank.

    Args:
        config: Configuration of the run.
        parameters: Number of trained parameters.
        traced: Trace of the heaviest pass.
        ranks: Number of ranks.
        passes: Forward passes per rank and step.
        stage: ZeRO stage.
        frozen: Number of frozen parameters in the trained networks.
        gloo: Collectives run through gloo (on CPUs), which makes temporary copies when it gathers.
    """
    each = 2 if config.precision is Precision.bf16 else 4
    mine = -(-parameters // ranks)
    owned = mine if stage else parameters
    weights = (mine + -(-frozen // ranks) if stage == 3 else parameters + frozen) * each
    master = owned * 4 if each == 2 or stage else 0
    sizes = _Sizes(each, parameters * each, owned * each, owned * 4, passes, traced, ranks, gloo)
    zero: dict[str, Any] = config.deepspeed.get("zero_optimization", {})
    if stage == 0:
        bucket, backward, update = _unpartitioned(sizes)
    elif stage == 3:
        bucket, backward, update = _partitioned_weights(sizes, zero, parameters + frozen)
    else:
        bucket, backward, update = (_partitioned_states if stage == 1 else _partitioned_gradients)(sizes, zero)
    gradients = sizes.own if stage >= 2 else sizes.all
    averages = 4 * owned * (1 + len(config.optim.ema_lengths))
    return Memory(
        weights, gradients, master + 8 * owned, averages, traced.encoder_weights, sizes.activations, bucket, backward,
        update,
    )  # fmt: skip


def kept_gathered(zero: dict[str, Any], weights: int) -> bool:
    """True if ZeRO-3 keeps `weights` gathered elements from the forward to the backward pass."""
    return 2 * weights <= int(zero.get("stage3_max_reuse_distance", _REUSE))


def _sent(sizes: _Sizes, zero: dict[str, Any]) -> tuple[int, int]:
    """Bytes of DeepSpeed's contiguous gradient buffers, and of the gradients that are reduced together."""
    bucket = int(zero.get("reduce_bucket_size", _BUCKET)) * sizes.each
    buffers = (2 if zero.get("overlap_comm") else 1) if zero.get("contiguous_gradients", True) else 0
    return buffers * bucket, min(bucket, sizes.all)


def _unpartitioned(s: _Sizes) -> tuple[int, int, int]:
    """Bucket, backward and update peak at stage 0: all gradients are alive at the end, and are reduced in buckets."""
    held = s.all if s.passes > 1 else 0  # later passes begin with the gradients of the earlier ones
    if s.each == 4:  # `training/engine/collectives.py`; with several buckets, all but the last during the pass
        copied = min(s.all, BUCKET) if s.ranks > 1 else 0
        during = copied if copied < s.all else 0
    else:
        copied, during = min(s.all, _BUCKET * s.each), 0
    backward = max(s.activations + held + during, 0 if held else s.accumulating + during, s.all + copied)
    return copied, backward, s.all + (s.master if s.each == 2 else 0)


def _partitioned_states(s: _Sizes, zero: dict[str, Any]) -> tuple[int, int, int]:
    """Bucket, backward and update peak of ZeRO-1."""
    buffer, sent = _sent(s, zero)
    held = s.all + buffer if s.passes > 1 else 0
    # this rank's gradients are copied out of the buffer while gradients of other buckets are still alive
    sending = max(s.all + buffer, s.all - sent + buffer + s.own) if buffer else s.all + sent
    backward = max(s.activations + held, 0 if held else s.accumulating + buffer, sending)
    return buffer or sent, backward, max(s.own + s.cast, s.scratch(s.all))  # new weights are gathered at the end


def _partitioned_gradients(s: _Sizes, zero: dict[str, Any]) -> tuple[int, int, int]:
    """Bucket, backward and update peak of ZeRO-2."""
    buffer, sent = _sent(s, zero)
    held = s.own if s.passes > 1 else 0  # the sum over the passes so far
    backward = max(s.activations, buffer + s.sending(sent, waits=not buffer, keeps=True))
    return buffer or sent, backward + held, max(s.own + s.cast, s.scratch(s.all))


def _partitioned_weights(s: _Sizes, zero: dict[str, Any], weights: int) -> tuple[int, int, int]:
    """Bucket, backward and update peak of ZeRO-3.

    The gradient buffer and this rank's gradients are always alive. Weights stay gathered until they are no longer used,
    small ones for ever. They are gathered several at a time into a buffer, which lives until its last weight is used,
    and copied out of it. If weights are kept from the forward to the backward pass, the last ones are gathered before
    the activations of their layers exist.
    """
    buffer, sent = _sent(s, zero | {"overlap_comm": False})  # ZeRO-3 has one buffer even with overlap_comm
    gathered = min(int(zero.get("stage3_max_live_parameters", _LIVE)), weights) * s.each
    limit = int(zero.get("stage3_param_persistence_threshold", PERSISTENT))
    small = sum(moment.elements for moment in s.trace.made if moment.elements <= limit) * s.each
    large = max(0, gathered - small)
    arriving = min(int(zero.get("stage3_prefetch_bucket_size", _PREFETCH)) * s.each, large)
    there = s.activations * (1 - arriving / max(1, large)) if kept_gathered(zero, weights) else s.activations
    backward = max(
        gathered + arriving + s.activations,
        gathered + arriving + s.scratch(arriving) + int(there),
        gathered + s.sending(sent, waits=False, keeps=False),
    )
    return buffer + gathered, s.own + buffer + backward, s.own + buffer + small + s.cast
