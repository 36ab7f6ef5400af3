"""Comparison of several runs in a table on the terminal and in a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from sora_train.core.charts import finite
from sora_train.core.cli import InputError
from sora_train.operations.records import Record, differences


def table(records: Sequence[Record], figures: Sequence[str]) -> None:
    """Print the differing keys and the last values of figures."""
    shown = Table(title="differences, then last values")
    shown.add_column("", no_wrap=True)  # abbreviated keys would be useless
    for record in records:
        shown.add_column(record.name, justify="right", overflow="fold")
    for key, values in differences(list(records)).items():
        shown.add_row(key, *("null" if value is None else str(value) for value in values))
    shown.add_section()
    for name, last in last_values(records, figures).items():
        shown.add_row(name, *("" if value is None else f"{value:.5g}" for value in last))
    shown.add_row("state", *(str(r.end.get("reason", "still running, or killed")) for r in records))
    Console().print(shown)


def plot(records: Sequence[Record], figures: Sequence[str], path: Path) -> None:
    """Draw the curves of each figure over steps. Raises InputError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("png=... needs matplotlib (pip install -e '.[dash]'); html=... needs nothing") from error
    names = [n for n in figures if any(len(r.curves.get(n, [])) > 1 for r in records)]
    if not names:
        raise InputError(f"no run has a curve of {', '.join(figures)}; there is nothing to draw")
    drawing = Figure(figsize=(6.0 * min(2, len(names)), 3.2 * -(-len(names) // 2)), layout="constrained")
    for place, name in enumerate(names):
        axes = drawing.add_subplot(-(-len(names) // 2), min(2, len(names)), place + 1)
        for record in records:
            if curve := finite(record.curves.get(name, [])):
                axes.plot(*zip(*curve, strict=True), label=record.name)
        axes.set(xlabel="step", title=name)
        axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    drawing.savefig(path, dpi=120)


def last_values(records: Sequence[Record], figures: Sequence[str]) -> Mapping[str, list[float | None]]:
    """Last value of each figure in every run; figures without any value are left out."""
    rows = {name: [record.last(name) for record in records] for name in figures}
    return {name: values for name, values in rows.items() if any(value is not None for value in values)}
