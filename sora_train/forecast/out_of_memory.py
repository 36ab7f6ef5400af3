"""Advice after running out of memory: where it happened, and the smallest change of the configuration that may fit."""

from __future__ import annotations

import copy
from collections.abc import Iterator

from sora_train.config.registry import METHODS
from sora_train.config.schema import Config
from sora_train.forecast.estimate import count_parameters, heaviest_pass, passes_per_rank
from sora_train.forecast.footprint import memory, stage_of
from sora_train.forecast.trace import trace
from sora_train.training.parts import Place

_SAFETY = 0.7  # share of the memory that a suggestion may need, since the estimate was too low for this run
_GIB = 2**30
_BY_PHASE = {  # phases that the estimate of a training step doesn't cover
    "data": "decoded clips wait in host memory; lower data.prefetch_steps or data.workers",
    "samples": "lower logging.sample_clips, or set logging.sample_every=0 and sample from a checkpoint",
    "save": "a save copies 16 bytes a parameter, over all ranks, to host memory; use more ranks, or hosts with more",
}
_SIGNS = ("out of memory", "can't allocate memory", "cannot allocate memory", "alloc_failed")


def is_out_of_memory(error: BaseException) -> bool:
    """True if an error means that host or device memory ran out."""
    return isinstance(error, MemoryError) or any(sign in str(error).lower() for sign in _SIGNS)


def line(place: Place, change: str, snapshot: str = "") -> str:
    """Compose the message: place, advice, and path of the snapshot of device memory, if there is one."""
    return f"out of memory {place}: {change}" + (f"; memory snapshot: {snapshot}" if snapshot else "")


def advice(phase: str, config: Config, ranks: int, available_bytes: int) -> str:
    """Advice for a phase; by default that for a training step."""
    return _BY_PHASE.get(phase) or suggestion(config, ranks, available_bytes)


def suggestion(config: Config, ranks: int, available_bytes: int) -> str:
    """Sentence with the memory that a step needs, the memory available, and overrides that should fit."""
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
    """Forecast the peak bytes of one rank in a step whose slots are full of the longest clips."""
    parameters, frozen = count_parameters(config)
    heaviest = heaviest_pass(config, None, ranks)
    traced, passes = trace(config, heaviest.sizes, ranks=heaviest.ranks), passes_per_rank(config, ranks)
    return memory(config, parameters - frozen, traced, ranks, passes, stage_of(config), frozen=frozen).peak


def _smaller(config: Config, ranks: int) -> Iterator[str]:
    """Change `config` in place to need less memory, cheapest change first. Yields each change as an override."""
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
    """Keep the last value of each key."""
    words = [word for override in overrides for word in override.split()]
    return list({word.partition("=")[0]: word for word in words}.values())
