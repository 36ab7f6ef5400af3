"""Device memory of one rank: what lives all the time, and the most that a step adds to it.

Model states after Rajbhandari et al. 2020, "ZeRO" (arXiv 1910.02054, section 3). What a step adds follows what
DeepSpeed 0.19 allocates, in the order in which it does (`runtime/zero/stage_1_and_2.py`, `stage3.py`; without ZeRO
`runtime/engine.py` and `runtime/fp16/unfused_optimizer.py`); benchmarks/plan_accuracy.py holds it against real runs.

Without overlap ZeRO-1 sends gradients after the backward pass, so all of them are there at its end; ZeRO-2 and 3 send
them as buckets fill. To send a bucket, its gradients are copied together once more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sora_train.config.schema import Config, Precision
from sora_train.forecast.trace import Trace

_BUCKET = 500_000_000  # elements, DeepSpeed's default
_LIVE = 1_000_000_000  # elements that ZeRO-3 keeps gathered, DeepSpeed's default
_PREFETCH = 50_000_000  # elements that ZeRO-3 gathers at once, DeepSpeed's default
_REUSE = 1_000_000_000  # elements between two uses of a weight up to which ZeRO-3 keeps it, DeepSpeed's default
PERSISTENT = 100_000  # elements of a parameter up to which ZeRO-3 leaves it gathered, DeepSpeed's default


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank. `backward` and `update` are what the two halves of a step add to the rest at most."""

    weights: int
    gradients: int
    optimizer: int  # fp32 masters and Adam's two moments
    ema: int
    encoder: int  # weights of the frozen VAE
    activations: int
    bucket: int  # gradients under way and, at stage 3, gathered weights
    backward: int
    update: int

    @property
    def states(self) -> int:
        """What lives from start to end."""
        return self.weights + self.optimizer + self.ema + self.encoder

    @property
    def peak(self) -> int:
        """The most at any time."""
        return self.states + max(self.backward, self.update)


@dataclass(frozen=True)
class _Sizes:
    """Bytes that the stages share out differently."""

    each: int  # of one weight, and of one gradient
    all: int  # gradients of all parameters
    own: int  # of them, this rank's part
    master: int  # this rank's part in fp32
    passes: int
    trace: Trace
    ranks: int
    gloo: bool

    @property
    def cast(self) -> int:
        """What Adam's fp32 gradient needs beside the one in the model's precision, copied together first."""
        return self.own + (self.master if self.each == 2 else 0)

    def scratch(self, gathered: int) -> int:
        """What the library that gathers `gathered` bytes takes beside them while it does."""
        return gathered + gathered // self.ranks if self.gloo else 0

    @property
    def activations(self) -> int:
        """Most bytes of a pass, gradients of the weights left out."""
        return max(self.trace.activations, self.trace.encoder)

    @property
    def accumulating(self) -> int:
        """Most bytes of a pass whose gradients all stay, from the first of them on."""
        most = earlier = 0
        for moment in self.trace.made:
            most = max(most, moment.most + earlier)
            earlier += moment.elements * self.each
        return max(most, self.all)

    def sending(self, bucket: int, waits: bool, keeps: bool) -> int:
        """Most bytes of a pass that sends gradients as soon as there are `bucket` bytes of them, in a copy.

        Whether those that wait for it, and this rank's part of those that were sent, count here.
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
    """The ZeRO stage of a run."""
    return int(config.deepspeed.get("zero_optimization", {}).get("stage", 0))


def memory(
    config: Config, parameters: int, traced: Trace, ranks: int, passes: int, stage: int, frozen: int = 0,
    gloo: bool = False,
) -> Memory:  # fmt: skip
    """Memory of one rank of `ranks` at a ZeRO stage, `passes` forward passes to a step.

    `parameters` are trained; `frozen` ones are there beside them. gloo, through which CPUs talk, gathers by way of
    copies of its own of what comes in and of what goes out.
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
    """Whether ZeRO-3 keeps `weights` elements from the forward to the backward pass once they are gathered."""
    return 2 * weights <= int(zero.get("stage3_max_reuse_distance", _REUSE))


def _sent(sizes: _Sizes, zero: dict[str, Any]) -> tuple[int, int]:
    """Bytes of the buffer that gradients are gathered in, and of those that are sent together."""
    bucket = int(zero.get("reduce_bucket_size", _BUCKET)) * sizes.each
    buffers = (2 if zero.get("overlap_comm") else 1) if zero.get("contiguous_gradients", True) else 0
    return buffers * bucket, min(bucket, sizes.all)


def _unpartitioned(s: _Sizes) -> tuple[int, int, int]:
    """Every gradient is there at the end; the engine copies them together, half a billion at a time."""
    copied = min(s.all, _BUCKET * s.each)
    held = s.all if s.passes > 1 else 0  # from the second pass on they are there from the start
    backward = max(s.activations + held, 0 if held else s.accumulating, s.all + copied)
    return copied, backward, s.all + (s.master if s.each == 2 else 0)


def _partitioned_states(s: _Sizes, zero: dict[str, Any]) -> tuple[int, int, int]:
    """ZeRO-1."""
    buffer, sent = _sent(s, zero)
    held = s.all + buffer if s.passes > 1 else 0
    # own gradients leave the buffer for a place of their own while the rest of the others is still there
    sending = max(s.all + buffer, s.all - sent + buffer + s.own) if buffer else s.all + sent
    backward = max(s.activations + held, 0 if held else s.accumulating + buffer, sending)
    return buffer or sent, backward, max(s.own + s.cast, s.scratch(s.all))  # new weights are gathered at the end


def _partitioned_gradients(s: _Sizes, zero: dict[str, Any]) -> tuple[int, int, int]:
    """ZeRO-2."""
    buffer, sent = _sent(s, zero)
    held = s.own if s.passes > 1 else 0  # the sum over the passes so far
    backward = max(s.activations, buffer + s.sending(sent, waits=not buffer, keeps=True))
    return buffer or sent, backward + held, max(s.own + s.cast, s.scratch(s.all))


def _partitioned_weights(s: _Sizes, zero: dict[str, Any], weights: int) -> tuple[int, int, int]:
    """ZeRO-3: the buffer and this rank's gradients stay; weights once gathered stay until they are used no more.

    Small ones stay for ever. The others come together in buffers, of which the last lives until its last weight is
    used, and are copied out of them. Where they are kept from forward to backward, the last ones arrive before the
    activations of what uses them are there.
    """
    buffer, sent = _sent(s, zero | {"overlap_comm": False})  # it has one buffer, even where it overlaps
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
