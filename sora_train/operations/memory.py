"""Out of memory ends with a suggestion: the smallest change of the configuration whose estimate fits."""

from __future__ import annotations

import copy
from collections.abc import Iterator

from torch import nn

from sora_train.config import Config, Method
from sora_train.operations.planner import Estimate, estimate

_SAFETY = 0.7  # of what was there, because the estimate that said it would fit was wrong
_GIB = 2**30
_SIGNS = ("out of memory", "can't allocate memory", "cannot allocate memory", "alloc_failed")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that host or device memory ran out."""
    return isinstance(error, MemoryError) or any(sign in str(error).lower() for sign in _SIGNS)


def suggestion(config: Config, network: nn.Module, ranks: int, available_bytes: int) -> str:
    """One line: what was needed, what there is, and the overrides that should fit. `network` may be on meta."""
    now = _bytes(estimate(config, network, None, ranks))
    target = _SAFETY * min(available_bytes, now)
    tried, overrides = copy.deepcopy(config), []
    for override in _smaller(tried, ranks):
        overrides.append(override)
        need = _bytes(estimate(tried, network, None, ranks))
        if need <= target:
            return (
                f"out of memory: about {now / _GIB:.2f} GiB per rank of {available_bytes / _GIB:.2f} GiB; "
                f"try {' '.join(_last(overrides))} (about {need / _GIB:.2f} GiB)"
            )
    return (
        f"out of memory: about {now / _GIB:.2f} GiB per rank of {available_bytes / _GIB:.2f} GiB, and nothing that "
        "keeps the model makes it fit; use more ranks with deepspeed=zero3, or a smaller model="
    )


def _bytes(figures: Estimate) -> int:
    return figures.state_bytes + figures.activation_bytes


def _smaller(config: Config, ranks: int) -> Iterator[str]:
    """Change `config` in place step by step, what costs least first; yields each change as an override."""
    per_rank = -(-config.data.slots // ranks)
    if (config.parallel.accumulation or per_rank) < per_rank:
        config.parallel.accumulation = per_rank
        yield f"parallel.accumulation={per_rank}"
    if config.method is Method.diffusion and config.model.activation_checkpointing == "none":
        config.model.activation_checkpointing = "block"
        yield "model.activation_checkpointing=block"
    zero = config.deepspeed.setdefault("zero_optimization", {})
    highest = 2 if config.method is Method.autoencoder else 3
    for stage in range(zero.get("stage", 0) + 1, highest + 1 if ranks > 1 else 0):
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
