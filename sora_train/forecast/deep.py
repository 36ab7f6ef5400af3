"""Trace of a deep model from those of the same model with three and with four blocks: seconds, whatever its depth.

Where all blocks are alike, each adds the same operations to a pass, and the same bytes to all that is alive while later
blocks run. So the figures of a trace are linear in the depth, and the fourth block says what all further ones add.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from sora_train.config.registry import FAMILIES, METHODS
from sora_train.config.schema import Config
from sora_train.forecast.trace import Made, Operation, Size, Trace, trace

_FEW, _MORE = 3, 4  # blocks: the first, the last, and those between, which stand for all further ones


def deep_trace(config: Config, sizes: Sequence[Size], encoded: bool = False, ranks: int | None = None) -> Trace:
    """The figures of `trace`; operations of further blocks stand at the end instead of in their place.

    A method that trains several networks is traced as a whole.
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
    """The operations that one more block adds; those that only grow with the number of blocks are not among them."""
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
    """A figure with so many more blocks, from those of two depths that differ by one."""
    return more + blocks * (more - few)


def _moments(few: Sequence[Made], more: Sequence[Made], further: int) -> tuple[Made, ...] | None:
    """Moments of all gradients of a deeper model, the last block's first; None if no four blocks are recognised.

    Bytes that are alive grow with the blocks before the one whose gradient is computed. The last block is a case of its
    own, and so is the first.
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
