"""Parts of samples that a configuration leaves out of training without refusing them: ends of captions and of clips."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from sora_train.config.registry import METHODS
from sora_train.config.schema import Config
from sora_train.data.index.index import Index
from sora_train.data.order.curriculum import Stages
from sora_train.data.order.plan import PlanInputs
from sora_train.data.order.selection import Selection
from sora_train.data.read.decode import DecodeError

_ROWS = 200_000  # that are looked at; of larger sets, those of some shards
_READ = 128  # captions that are tokenized
_UNLIMITED = 1 << 40

Count = Callable[[Sequence[str]], list[int]]  # tokens of captions before any are cut off


def left_out(config: Config, plan: Stages, count: Count) -> list[str]:
    """Warnings about captions and clips that will be shortened: their share, and a limit that would avoid it."""
    rows = _some_rows(plan.index, plan.inputs.filters)
    lines = [shortened_clips(stage.inputs, plan.index, rows) for stage in plan.plans]
    if METHODS.get(config.method).reads_captions and plan.index.encoded() == {""}:
        lines.append(cut_captions(config.text_encoder.max_tokens, plan.index, rows, count))
    return list(dict.fromkeys(filter(None, lines)))


def shortened_clips(inputs: PlanInputs, index: Index, rows: np.ndarray) -> str:
    """A line on clips that `data.max_tokens` makes shorter than `data.max_frames` would; empty if there are none."""
    cut, whole = inputs.cuts(index, rows), replace(inputs, max_tokens=_UNLIMITED).cuts(index, rows)
    short = np.flatnonzero(cut.frames < whole.frames)
    if not len(short):
        return ""
    worst = short[np.argmax(whole.frames[short] - cut.frames[short])]
    height, width = cut.crop[worst, 2:]
    return (
        f"warning: data.max_tokens={inputs.max_tokens} shortens {_share(len(short), rows, index)} of the clips, at "
        f"{width}x{height} to {cut.frames[worst]} of {whole.frames[worst]} frames; "
        f"{whole.tokens[short].max()} tokens would hold them all"
    )


def cut_captions(limit: int, index: Index, rows: np.ndarray, count: Count) -> str:
    """A line on captions of more than `text_encoder.max_tokens`, the limit: their ends are not trained on.

    Empty where there are none. Captions are read of the samples whose longest has so many characters that it may have
    as many tokens.
    """
    long = rows[index.columns["caption_chars"][rows] >= limit - 1]
    if not len(long):
        return ""
    some = long[np.unique(np.linspace(0, len(long) - 1, min(len(long), _READ)).astype(int))]
    with ThreadPoolExecutor(8) as threads:
        longest = [max(counts) for counts in threads.map(lambda row: _counts(index, int(row), count), some) if counts]
    over = sum(tokens > limit for tokens in longest)
    if not over:
        return ""
    share = _share(round(over / len(some) * len(long)), rows, index)
    return (
        f"warning: {share} of the samples have captions of more than text_encoder.max_tokens={limit} tokens; what is "
        f"beyond is not trained on (the longest of {len(some)} that were read has {max(longest)})"
    )


def _counts(index: Index, row: int, count: Count) -> list[int]:
    try:
        captions = index.captions(row)[0]
    except DecodeError:  # the loader counts it
        return []
    return count(captions)


def _some_rows(index: Index, filters: Sequence[str]) -> np.ndarray:
    """Rows that may be planned, of so many evenly spread shards that they are enough to tell shares from."""
    shards = len(index.shards)
    count = max(1, min(shards, round(_ROWS / max(1, len(index)) * shards)))
    return Selection(index, filters).rows(np.unique(np.linspace(0, shards - 1, count).astype(np.int64)))[0]


def _share(count: int, rows: np.ndarray, index: Index) -> str:
    return f"{count:,} of {len(rows):,}" if len(index) <= _ROWS else f"{count / len(rows):.1%}"
