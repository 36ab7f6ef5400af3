"""Device memory of one rank: what lives all the time, and the most that a step adds to it.

Model states after Rajbhandari et al. 2020, "ZeRO" (arXiv 1910.02054, section 3); what a step adds was read off
DeepSpeed 0.19's allocations (`benchmarks/plan_accuracy.py` holds the two together): a bucket for reductions, the
gradients, and in the update a flat fp32 copy of this rank's gradients with two temporaries of Adam.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sora_train.config import Config, Precision
from sora_train.operations.trace import Trace

_BUCKET = 500_000_000  # elements, DeepSpeed's default
_LIVE = 1_000_000_000  # elements that ZeRO-3 keeps gathered, DeepSpeed's default


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank. `backward` and `update` are what the two halves of a step add to the rest at most."""

    weights: int
    gradients: int
    optimizer: int  # fp32 masters and Adam's two moments
    ema: int
    encoder: int  # weights of the frozen VAE
    activations: int
    bucket: int  # reductions, and at stage 3 gathered weights
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


def stage_of(config: Config) -> int:
    """The ZeRO stage of a run."""
    return int(config.deepspeed.get("zero_optimization", {}).get("stage", 0))


def memory(
    config: Config, parameters: int, traced: Trace, ranks: int, passes: int, stage: int, frozen: int = 0
) -> Memory:
    """Memory of one rank of `ranks` at a ZeRO stage, `passes` forward passes to a step.

    `parameters` are trained; `frozen` ones are there beside them.
    """
    each = 2 if config.precision is Precision.bf16 else 4
    mine = -(-parameters // ranks)
    owned = mine if stage else parameters
    weights = (mine + -(-frozen // ranks) if stage == 3 else parameters + frozen) * each
    master = owned * 4 if stage or each == 2 else 0
    kept = mine if stage >= 2 or (stage == 1 and passes == 1) else parameters
    gradients = kept * each
    activations = max(traced.activations, traced.encoder)
    bucket = _bucket(config, parameters, stage, frozen) * each
    if stage == 0 and passes == 1:
        backward = max(traced.with_gradients, traced.encoder)
    else:  # from the second pass on the gradients are there from the start
        backward = max(activations + (gradients if passes > 1 else 0), traced.later + gradients) + bucket
    copies = 3 * 4 * owned if stage else (4 * parameters if each == 2 else 0)
    update = gradients + copies
    averages = 4 * owned * (1 + len(config.optim.ema_lengths))
    return Memory(
        weights, gradients, master + 8 * owned, averages, traced.encoder_weights, activations, bucket, backward, update
    )


def _bucket(config: Config, parameters: int, stage: int, frozen: int) -> int:
    """Elements of the buffers that DeepSpeed's own settings ask for."""
    zero: dict[str, Any] = config.deepspeed.get("zero_optimization", {})
    if stage == 0 or (stage < 3 and not zero.get("contiguous_gradients", True)):  # then nothing is copied together
        return 0
    bucket = int(zero.get("reduce_bucket_size", _BUCKET)) * (2 if stage < 3 and zero.get("overlap_comm") else 1)
    if stage < 3:
        return bucket
    return min(bucket, parameters) + min(int(zero.get("stage3_max_live_parameters", _LIVE)), parameters + frozen)
