"""The part of `inspect`'s page on a configuration: which samples it leaves out, and how it packs the others."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Sequence
from functools import partial

import numpy as np

from sora_train.config.schema import Config
from sora_train.data.index.index import Index
from sora_train.data.left_out import left_out as warnings
from sora_train.data.order.balance import packed
from sora_train.data.order.curriculum import build_stages
from sora_train.data.order.plan import Plan, Slots
from sora_train.data.order.selection import Selection
from sora_train.data.shards import plan_inputs
from sora_train.encoding.captions import count_tokens

_SHOWN = 16  # slots of the step that is drawn
_NAMED = 6  # keys shown as examples of the samples that a filter leaves out


def report(config: Config, index: Index, source_of: list[str], filters: list[str]) -> str:
    """HTML on what is left out of each source and why, and on how clips are cut and packed in each training stage.

    Args:
        config: The configuration.
        index: Index of its training shards.
        source_of: Source of each shard.
        filters: Filter of each shard.
    """
    inputs = plan_inputs(config, filters, config.flow.tasks)
    parts = ["<h2>What this configuration leaves out</h2>", left_out(index, source_of, filters)]
    stages = build_stages(index, source_of, config.data, inputs)
    cut = warnings(config, stages, partial(count_tokens, config))
    parts += [f"<p class=bad>{html.escape(line)}</p>" for line in cut]
    for number, plan in enumerate(stages.plans):
        until = f", until step {stages.ends[number]:,}" if number < len(stages.ends) else ""
        of = f" in stage {number + 1} of {len(stages.plans)}{until}" if len(stages.plans) > 1 else ""
        parts += [f"<h2>How it packs{of}</h2>", packing(plan)]
    return "".join(parts)


def left_out(index: Index, source_of: list[str], filters: list[str]) -> str:
    """HTML table of sources: their samples, those the index refused, and those the filter left out, with examples."""
    selection = Selection(index, filters)
    head = ("source", "shards", "samples", "refused by the index", "left out by the filter", "filter")
    rows = []
    for source in dict.fromkeys(source_of):
        shards = np.flatnonzero(np.asarray(source_of, dtype=object) == source)
        rows_of = np.flatnonzero(np.isin(index.shard, shards))
        usable = rows_of[index.usable[rows_of]]
        kept = selection.rows(shards)[0]
        without = np.setdiff1d(usable, kept)
        causes = Counter(index.columns["refused"][np.setdiff1d(rows_of, usable)].tolist())
        why = ", ".join(f"{cause} {count:,}" for cause, count in causes.most_common(4))
        names = ", ".join(str(index.key[row]) for row in without[:_NAMED]) + (", ..." if len(without) > _NAMED else "")
        rows.append((
            source, f"{len(shards):,}", f"{len(rows_of):,}", f"{causes.total():,}" + (f" ({why})" if why else ""),
            f"{len(without):,}" + (f" ({names})" if names else ""), filters[int(shards[0])] or "none",
        ))  # fmt: skip
    return table(head, rows)


def packing(plan: Plan) -> str:
    """HTML with the figures of a plan, and a drawing of its first step: a line per slot, a rectangle per clip."""
    steps, i = plan.steps(0, 0), plan.inputs
    if not steps:
        return "<p class=bad>not one step: no sample is left</p>"
    figures, visits = packed(plan), [visit for slots in steps for slot in slots for visit in slot]
    tokens = [i.geometry.tokens(*visit.size) for visit in visits]
    rows = [
        ("steps of an epoch", f"{figures.steps:,}"),
        ("clips of a step", f"{len(visits) / len(steps):.1f} in {i.slots} slots"),
        ("tokens of a clip", f"{min(tokens):,} to {max(tokens):,}, mean {np.mean(tokens):,.0f}"),
        ("token budget used", f"{figures.fill:.1%} of data.max_tokens={i.max_tokens:,} a slot"),
        ("balance of the slots", f"{figures.balance:.1%}: the share of the time that ranks don't wait for the dearest"),
        ("a step's departure from the mix", f"at most {figures.departure:.1%} of its tokens"),
    ]
    if figures.balance < 0.9:
        rows.append(("advice", "the longest clip outweighs what a slot holds: raise data.max_tokens, or data.slots"))
    return table((), rows) + f"<p>The first step:</p>{drawn(plan, steps[0])}"


def drawn(plan: Plan, step: Slots) -> str:
    """SVG of a step's slots, with widths in proportion to tokens; clips' names appear under the mouse pointer."""
    width, high, lines = 960, 14, min(len(step), _SHOWN)
    pieces = []
    for line in range(lines):
        at = 0.0
        for number, visit in enumerate(step[line]):
            tokens = plan.inputs.geometry.tokens(*visit.size)
            wide = width * tokens / plan.inputs.max_tokens
            name = html.escape(str(plan.index.key[visit.sample]))
            size = "x".join(map(str, visit.size))
            pieces.append(
                f"<rect x={at:.1f} y={line * high} width={max(wide - 1, 0.5):.1f} height={high - 3} "
                f"opacity={0.95 - 0.35 * (number % 2):.2f}><title>{name}: {size}, {tokens:,} tokens</title></rect>"
            )
            at += wide
    more = f"<p>and {len(step) - lines} more slots</p>" if len(step) > lines else ""
    return f"<svg class=wide viewBox='0 0 {width} {lines * high}' role=img>{''.join(pieces)}</svg>{more}"


def table(head: Sequence[str], rows: Sequence[tuple[str, ...]]) -> str:
    """HTML table of rows of text."""
    lines = [f"<tr>{''.join(f'<th>{html.escape(cell)}</th>' for cell in head)}</tr>"] if head else []
    lines += [f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows]
    return f"<table>{''.join(lines)}</table>"
