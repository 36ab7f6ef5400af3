"""Options of `data_tools.curate`; the docstring of that module explains them."""

from __future__ import annotations

import os
from dataclasses import dataclass

from data_tools.curation.rules import DEFAULT
from sora_train.core.options import choice, number

NO_MODEL = (None, "none", "beside")  # values of captions= that need no model


@dataclass
class Settings:
    """The command's options."""

    videos: str = "???"
    out: str = "???"
    captions: str | None = None
    model: str | None = None
    licences: str | None = None
    licence: str | None = None
    forbidden: str | None = None
    keep: str = DEFAULT
    until: str = choice(("shards", "scores"), "shards")
    min_seconds: float = number(2.0, least=0.5)
    max_seconds: float = number(20.0, least=1)
    trim: float = number(0.25, least=0)
    short_side: int = number(256, least=16)
    max_side: int | None = number(None, least=16)
    cut_threshold: float = number(3.0, above=0)
    near: float = number(8.0, least=0, most=32)
    review: float = number(12.0, least=0, most=32)
    near_model: str | None = None
    near_cosine: float = number(0.95, above=0, most=1)
    cut: str = choice(("encode", "copy"), "encode")
    crf: int = number(18, least=0, most=51)
    gop: int = number(24, least=1)
    stills: int = number(8, least=1, most=64)
    requests: int = number(8, least=1, most=256)
    shard_size: float = number(256.0, above=0)
    workers: int | None = number(None, least=1)
    engine: str = choice(("pool", "ray"), "pool")
    strict: bool = False

    @property
    def has_model(self) -> bool:
        """Tell whether a model writes the captions."""
        return self.captions not in NO_MODEL

    @property
    def workers_or_all(self) -> int:
        """Number of worker processes: `workers`, or one for each core."""
        return self.workers or len(os.sched_getaffinity(0))
