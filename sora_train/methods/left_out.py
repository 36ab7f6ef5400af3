"""Parts of samples that a configuration leaves out of training without refusing them: ends of captions and of clips."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from sora_train.config.schema import Config, Method
from sora_train.data.index.index import Index
from sora_train.data.order.curriculum import Stages
from sora_train.data.order.plan import PlanInputs
from sora_train.data.order.selection import Selection
from sora_train.data.read.decode import DecodeError
from sora_train.models.text.encoder import tokenize

_ROWS = 200_000  # that are looked at; of larger sets, those of some shards
_READ = 128  # captions that are tokenized
_UNLIMITED = 1 << 40


def left_out(config: Config, plan: Stages) -> list[str]:
    """Warnings for the start of a run: captions and clips that are cut, with their share and what would hold them."""
    rows = _some_rows(plan.index, plan.inputs.filters)
    lines = [shortened_clips(stage.inputs, plan.index, rows) for stage in plan.plans]
    if config.method is not Method.autoencoder and plan.index.encoded() == {""}:
        lines.append(cut_captions(config, plan.index, rows))
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


def cut_captions(config: Config, index: Index, rows: np.ndarray) -> str:
    """A line on captions of more than `text_encoder.max_tokens`, whose ends are not trained on; empty for none.

    Captions are read of the samples whose longest has so many characters that it may have as many tokens.
    """
    limit = config.text_encoder.max_tokens
    long = rows[index.columns["caption_chars"][rows] >= limit - 1]
    if not len(long):
        return ""
    some = long[np.unique(np.linspace(0, len(long) - 1, min(len(long), _READ)).astype(int))]
    with ThreadPoolExecutor(8) as threads:
        longest = [max(counts) for counts in threads.map(lambda row: _counts(config, index, int(row)), some) if counts]
    over = sum(count > limit for count in longest)
    if not over:
        return ""
    share = _share(round(over / len(some) * len(long)), rows, index)
    return (
        f"warning: {share} of the samples have captions of more than text_encoder.max_tokens={limit} tokens; what is "
        f"beyond is not trained on (the longest of {len(some)} that were read has {max(longest)})"
    )


def _counts(config: Config, index: Index, row: int) -> list[int]:
    try:
        captions = index.captions(row)[0]
    except DecodeError:  # the loader counts it
        return []
    return count_tokens(config, captions)


def count_tokens(config: Config, captions: Sequence[str]) -> list[int]:
    """Tokens of captions before any are cut off."""
    text = config.text_encoder
    if text.path is not None:
        from sora_train.models.text.released import token_counts  # transformers takes seconds to import

        return token_counts(text.path, captions)
    return [len(tokenize(caption, text.buckets, _UNLIMITED)) for caption in captions]


def _some_rows(index: Index, filters: Sequence[str]) -> np.ndarray:
    """Rows that may be planned, of so many evenly spread shards that they are enough to tell shares from."""
    shards = len(index.shards)
    count = max(1, min(shards, round(_ROWS / max(1, len(index)) * shards)))
    return Selection(index, filters).rows(np.unique(np.linspace(0, shards - 1, count).astype(np.int64)))[0]


def _share(count: int, rows: np.ndarray, index: Index) -> str:
    return f"{count:,} of {len(rows):,}" if len(index) <= _ROWS else f"{count / len(rows):.1%}"
