"""Parts of a step's time, from the events of torch's profiler, and what its collectives send."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "mv", "linear", "matmul", "convolution")
_ATTENTION = ("attention", "flash", "softmax")
_BYTES = {"float": 4, "double": 8, "c10::BFloat16": 2, "long int": 8, "int": 4, "unsigned char": 1}
# bytes that a rank sends in the best algorithm for each byte of the tensor that it gives, by the number of ranks
_SENT: dict[str, Callable[[int], float]] = {
    "all_reduce": lambda ranks: 2 * (ranks - 1) / ranks,
    "all_gather": lambda ranks: ranks - 1,
    "reduce": lambda ranks: (ranks - 1) / ranks,
    "broadcast": lambda ranks: (ranks - 1) / ranks,
    "all_to_all": lambda ranks: (ranks - 1) / ranks,
}


@dataclass
class Parts:
    """Seconds of one step by what they went into, and its collectives."""

    seconds: dict[str, float] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)  # collectives by kind
    collective_s: dict[str, float] = field(default_factory=dict)  # seconds under way by kind, also beside other work
    sent: float = 0.0  # bytes that a rank sends, in the best algorithm for these calls


def kind_of(name: str) -> str:
    """The kind of an operation: products, attention or elementwise; empty if it isn't an operation."""
    if any(word in name for word in _ATTENTION):
        return "attention"
    if not name.startswith("aten::"):
        return ""
    return "products" if name.removeprefix("aten::").lstrip("_") in _PRODUCTS else "elementwise"


def parts_of(events: Iterable[Any], ranks: int) -> Parts:
    """Divide the time of a step that was profiled under the name `part: step`.

    Time of the main thread in which no operation runs is waiting where a collective is under way, else the host's own.
    """
    every = list(events)
    [whole] = [e for e in every if e.name == "part: step"]
    start, end = whole.time_range.start, whole.time_range.end
    mine = [e for e in every if e.thread == whole.thread and not e.name.startswith("gloo:") and not e.is_async]
    update = [(e.time_range.start, e.time_range.end) for e in mine if e.name == "part: update"]
    found = Parts(dict.fromkeys(("products", "attention", "elementwise", "update"), 0.0))
    busy = []
    for e in mine:
        kind = kind_of(e.name)
        if not kind or e.time_range.start < start or e.time_range.end > end:
            continue
        in_update = any(a <= e.time_range.start < b for a, b in update)
        found.seconds["update" if in_update else kind] += e.self_cpu_time_total / 1e6
        busy.append((e.time_range.start, e.time_range.end))
    under_way = []
    for e in every:
        kind = e.name.partition("gloo:")[2]
        if kind:
            under_way.append((max(start, e.time_range.start), min(end, e.time_range.end)))
            found.collective_s[kind] = found.collective_s.get(kind, 0.0) + (e.time_range.end - e.time_range.start) / 1e6
            found.calls[kind] = found.calls.get(kind, 0) + 1
            found.sent += _SENT[kind](ranks) * _nbytes(e) if kind in _SENT else 0.0
    idle = _gaps(busy, start, end)
    waiting = sum(_overlap(gap, merged) for gap in idle for merged in _merged(under_way))
    found.seconds["waiting for collectives"] = waiting / 1e6
    found.seconds["host"] = max(0.0, sum(b - a for a, b in idle) - waiting) / 1e6
    return found


def _nbytes(event: Any) -> float:
    """Bytes of the tensors that a collective was given."""
    given = zip(event.input_shapes, event.input_dtypes, strict=True)
    return float(sum(math.prod(shape) * _BYTES.get(kind, 4) for shape, kind in given))


def _merged(spans: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    found: list[tuple[float, float]] = []
    for a, b in sorted(spans):
        if found and a <= found[-1][1]:
            found[-1] = (found[-1][0], max(b, found[-1][1]))
        elif b > a:
            found.append((a, b))
    return found


def _gaps(busy: Sequence[tuple[float, float]], start: float, end: float) -> list[tuple[float, float]]:
    found, at = [], start
    for a, b in _merged(busy):
        found += [(at, a)] if a > at else []
        at = b
    return [*found, (at, end)] if end > at else found


def _overlap(one: tuple[float, float], other: tuple[float, float]) -> float:
    return max(0.0, min(one[1], other[1]) - max(one[0], other[0]))
