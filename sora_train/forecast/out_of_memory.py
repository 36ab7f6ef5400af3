"""Out of memory ends with a line: where it happened, and the smallest change of the configuration that should fit."""

from __future__ import annotations

import copy
from collections.abc import Iterator

from sora_train.config.registry import METHODS
from sora_train.config.schema import Config
from sora_train.forecast.estimate import count_parameters, heaviest_pass, passes_per_rank
from sora_train.forecast.footprint import memory, stage_of
from sora_train.forecast.trace import trace
from sora_train.training.parts import Place

_SAFETY = 0.7  # of what was there, because the estimate that said it would fit was wrong
_GIB = 2**30
_BY_PHASE = {  # what the estimate of a training step says nothing about
    "data": "decoded clips wait in host memory; lower data.prefetch_steps or data.workers",
    "samples": "lower logging.sample_clips, or set logging.sample_every=0 and sample from a checkpoint",
    "save": "a save copies 16 bytes a parameter, over all ranks, to host memory; use more ranks, or hosts with more",
}
_SIGNS = ("out of memory", "can't allocate memory", "cannot allocate memory", "alloc_failed")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that host or device memory ran out."""
    return isinstance(error, MemoryError) or any(sign in str(error).lower() for sign in _SIGNS)


def line(place: Place, change: str, snapshot: str = "") -> str:
    """All that is said: where, what to change, and where the snapshot of the device's memory is, if there is one."""
    return f"out of memory {place}: {change}" + (f"; memory snapshot: {snapshot}" if snapshot else "")


def advice(phase: str, config: Config, ranks: int, available_bytes: int) -> str:
    """What to change where memory ran out in a phase."""
    return _BY_PHASE.get(phase) or suggestion(config, ranks, available_bytes)


def suggestion(config: Config, ranks: int, available_bytes: int) -> str:
    """What a step needs, what there is, and the overrides that should fit."""
    now = peak_bytes(config, ranks)
    target = _SAFETY * min(available_bytes, now)
    tried, overrides = copy.deepcopy(config), []
    for override in _smaller(tried, ranks):
        overrides.append(override)
        need = peak_bytes(tried, ranks)
        if need <= target:
            return (
                f"about {now / _GIB:.2f} GiB per rank of {available_bytes / _GIB:.2f} GiB; "
                f"try {' '.join(_last(overrides))} (about {need / _GIB:.2f} GiB)"
            )
    return (
        f"about {now / _GIB:.2f} GiB per rank of {available_bytes / _GIB:.2f} GiB, and nothing that "
        "keeps the model makes it fit; use more ranks with deepspeed=zero3, or a smaller model="
    )


def peak_bytes(config: Config, ranks: int) -> int:
    """Most bytes of one rank in a step whose slots are full of the longest clips, by the trace that `plan` prints."""
    parameters, frozen = count_parameters(config)
    sizes, _ = heaviest_pass(config, None, ranks)
    traced, passes = trace(config, sizes), passes_per_rank(config, ranks)
    return memory(config, parameters - frozen, traced, ranks, passes, stage_of(config), frozen).peak


def _smaller(config: Config, ranks: int) -> Iterator[str]:
    """Change `config` in place step by step, what costs least first; yields each change as an override."""
    per_rank = -(-config.data.slots // ranks)
    if (config.parallel.accumulation or per_rank) < per_rank:
        config.parallel.accumulation = per_rank
        yield f"parallel.accumulation={per_rank}"
    method = METHODS.get(config.method)
    if method.recomputes and config.model.activation_checkpointing == "none":
        config.model.activation_checkpointing = "block"
        yield "model.activation_checkpointing=block"
    zero = config.deepspeed.setdefault("zero_optimization", {})
    for stage in range(zero.get("stage", 0) + 1, method.highest_stage + 1 if ranks > 1 else 0):
        zero["stage"] = stage
        yield f"deepspeed=zero{stage}"
    while config.data.max_tokens >= 512:
        config.data.max_tokens //= 2
        config.data.slots *= 2
        config.parallel.accumulation = None  # one pass per slot
        yield f"data.max_tokens={config.data.max_tokens} data.slots={config.data.slots} parallel.accumulation=null"


def _last(overrides: list[str]) -> list[str]:
    """The last value of each key."""
    words = [word for override in overrides for word in override.split()]
    return list({word.partition("=")[0]: word for word in words}.values())
