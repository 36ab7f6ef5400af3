"""Trace of a deep model, extrapolated from traces with three and four blocks. It takes seconds, whatever the depth.

If all blocks are alike, each adds the same operations to a pass, and the same number of bytes that stay alive while
later blocks run. All figures of a trace are therefore linear in the depth: every further block adds the difference
between the traces of four and three blocks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from sora_train.config.registry import FAMILIES, METHODS
from sora_train.config.schema import Config
from sora_train.forecast.trace import Made, Operation, Size, Trace, trace

_FEW, _MORE = 3, 4  # traced depths: the first, the last, and one or two blocks between, from which to extrapolate


def deep_trace(config: Config, sizes: Sequence[Size], encoded: bool = False, ranks: int | None = None) -> Trace:
    """Compute the result of `trace` by extrapolation; see `trace` for the arguments.

    The operations of further blocks are appended at the end, not inserted in the order of execution. Models whose
    blocks aren't alike, with at most four blocks, or in whose gradients no four blocks are recognised, are traced
    completely.
    """
    further = config.model.depth - _MORE
    if further <= 0 or not (METHODS.get(config.method).recomputes and FAMILIES.get(config.model.family).alike):
        return trace(config, sizes, encoded, ranks)
    few, more = (
        trace(replace(config, model=replace(config.model, depth=depth)), sizes, encoded, ranks)
        for depth in (_FEW, _MORE)
    )
    made = _moments(few.made, more.made, further)
    if made is None:
        return trace(config, sizes, encoded, ranks)
    return Trace(
        _further(few.activations, more.activations, further),
        made,
        more.encoder,
        more.encoder_weights,
        more.operations + _of_a_block(few.operations, more.operations) * further,
        _further(few.modules, more.modules, further),
        _further(few.exchanged, more.exchanged, further),
        more.ranks,
    )


def _of_a_block(few: Sequence[Operation], more: Sequence[Operation]) -> tuple[Operation, ...]:
    """Operations that one more block adds, without those that exist once and only grow with the number of blocks."""
    before, after = Counter(few), Counter(more)
    grown = Counter(o.call.function for o in (before - after).elements() if o.call)
    added = []
    for operation in (after - before).elements():
        if operation.call and grown[operation.call.function] > 0:
            grown[operation.call.function] -= 1
        else:
            added.append(operation)
    return tuple(added)


def _further(few: int, more: int, blocks: int) -> int:
    """Extrapolate a figure to `blocks` blocks more than in `more`; `few` is the figure of one block less."""
    return more + blocks * (more - few)


def _moments(few: Sequence[Made], more: Sequence[Made], further: int) -> tuple[Made, ...] | None:
    """Extrapolate `Trace.made` to `further` more blocks than in `more`; None if no four blocks are recognised.

    The order is that of the backward pass: the last block comes first. Bytes alive grow linearly with the number of
    blocks before the one whose gradient is computed; the last and the first block are handled separately.
    """
    each, sizes = len(more) - len(few), [moment.elements for moment in more]
    alike = (n for n in range(len(more) - 4 * each + 1) if sizes[n : n + 3 * each] == sizes[n + each : n + 4 * each])
    start = next(alike, None) if each > 0 else None
    if start is None:
        return None
    deeper = [
        Made(_further(b.most, a.most, further), _further(b.now, a.now, further), a.elements)
        for a, b in zip(more[: start + 2 * each], few, strict=False)
    ]
    second, third = more[start + each : start + 2 * each], more[start + 2 * each : start + 3 * each]
    between = [
        Made(begin.most + n * (b.most - a.most), begin.now + n * (b.now - a.now), a.elements)
        for n in range(1, further + 2)
        for begin, a, b in zip(deeper[start + each :], second, third, strict=True)
    ]
    return (*deeper, *between, *more[start + 3 * each :])
