"""HTML page of one or several runs, self-contained: curves, samples, configuration and events."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sora_train.core.page import STYLE
from sora_train.operations.records import Curve, Record, differences, events, samples

_COLOURS = ("#4269d0", "#d9782d", "#3a9b63", "#c2415b", "#8b5cc7", "#2b9aa8", "#8a6d3b", "#666666")
_SIZE = (420, 190)
_MEDIA_BYTES = 24 << 20  # bytes of embedded samples; beyond it only file names are shown
_FIRST = ("loss", "validation_loss", "tokens_per_s", "mfu", "data_wait", "step_time", "grad_norm", "lr")


def page(title: str, records: Sequence[Record]) -> str:
    """Generate the page."""
    parts = [f"<h1>{html.escape(title)}</h1>", _legend(records), _ends(records)]
    parts += ["<h2>Curves</h2><div class=grid>", *(_figure(name, records) for name in _names(records)), "</div>"]
    if len(records) > 1:
        rows = [[key, *map(_short, values)] for key, values in differences(list(records)).items()]
        parts.append("<h2>What differs</h2>" + _table(["key", *(r.name for r in records)], rows))
    room = _MEDIA_BYTES
    for record in records:
        shown, room = _samples(record, room)
        parts.append(shown)
        parts.append(_table(["when", "event"], events(record.folder), f"Events of {record.name}"))
        refused = sorted(record.quarantine.items(), key=lambda item: -item[1])
        parts.append(_table(["cause", "samples refused"], refused, f"Data of {record.name}"))
    if len(records) == 1:
        rows = [[key, _short(value)] for key, value in records[0].config.items()]
        parts.append(_table(["key", "value"], rows, "Configuration"))
    body = "\n".join(part for part in parts if part)
    head = f'<meta charset=utf-8><meta name=viewport content="width=device-width"><title>{html.escape(title)}</title>'
    return f"<!doctype html><html lang=en><head>{head}<style>{STYLE}</style></head><body>{body}</body></html>\n"


def write_report(record: Record) -> Path:
    """Write `report.html` to a run folder."""
    path = record.folder / "report.html"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(page(record.name, [record]), encoding="utf-8")
    temporary.replace(path)
    return path


def _names(records: Sequence[Record]) -> list[str]:
    every = {name for record in records for name, curve in record.curves.items() if len(curve) > 1}
    return [n for n in _FIRST if n in every] + sorted(every - set(_FIRST))


def _legend(records: Sequence[Record]) -> str:
    if len(records) == 1:
        return ""
    key = '<span class=key style="background:{}"></span>{}'
    keys = (key.format(_colour(number), html.escape(record.name)) for number, record in enumerate(records))
    return f"<p>{' &nbsp; '.join(keys)}</p>"


def _ends(records: Sequence[Record]) -> str:
    rows = []
    for record in records:
        steps = max((curve[-1][0] for curve in record.curves.values() if curve), default=0)
        figures = [record.last(name) for name in ("loss", "validation_loss", "tokens_per_s")]
        state = record.end.get("reason", "still running, or killed")
        rows.append([record.name, state, steps, *("" if f is None else f"{f:.4g}" for f in figures)])
    return _table(["run", "state", "step", "loss", "validation loss", "tokens/s"], rows)


def _figure(name: str, records: Sequence[Record]) -> str:
    lines = [(n, finite(record.curves[name])) for n, record in enumerate(records) if name in record.curves]
    points = [point for _, curve in lines for point in curve]
    if not points:
        return ""
    width, height = _SIZE
    low_x, high_x = min(p[0] for p in points), max(p[0] for p in points)
    low_y, high_y = min(p[1] for p in points), max(p[1] for p in points)
    span_x, span_y = max(high_x - low_x, 1), (high_y - low_y) or 1.0

    def place(step: int, value: float) -> str:
        x, y = (step - low_x) / span_x * (width - 16), (value - low_y) / span_y * (height - 40)
        return f"{8 + x:.1f},{height - 20 - y:.1f}"

    drawn = "".join(
        f'<polyline fill=none stroke="{_colour(n)}" stroke-width=1.6 points="{" ".join(place(*p) for p in curve)}"/>'
        for n, curve in lines
    )
    label = html.escape(name)
    texts = (
        f"<text x=8 y=14>{high_y:.4g}</text><text x=8 y={height - 6}>{low_y:.4g}</text>"
        f"<text x={width - 8} y={height - 6} text-anchor=end>step {high_x}</text>"
    )
    return (
        f'<figure><svg viewBox="0 0 {width} {height}" width={width} height={height} role=img aria-label="{label}">'
        f"{texts}{drawn}</svg><figcaption>{label}</figcaption></figure>"
    )


def finite(curve: Curve) -> Curve:
    """Drop the points of a curve that aren't finite."""
    return [(step, value) for step, value in curve if math.isfinite(value)]


def _samples(record: Record, room: int) -> tuple[str, int]:
    """Players for the samples, newest step first, within `room` bytes; returns the remaining bytes too."""
    parts = []
    for step, clips in sorted(samples(record.folder).items(), reverse=True):
        parts.append(f"<h3>step {step}</h3><div class=grid>")
        for prompt, path in clips:
            size = path.stat().st_size
            caption = f"<figcaption>{html.escape(prompt)}</figcaption>"
            if size > room:
                parts.append(f"<figure>{html.escape(str(path.relative_to(record.folder)))}{caption}</figure>")
                continue
            room -= size
            data = base64.b64encode(path.read_bytes()).decode()
            if path.suffix == ".mp4":
                media = f'<video controls loop muted playsinline src="data:video/mp4;base64,{data}"></video>'
            else:
                media = f'<img class=sample alt="" src="data:image/png;base64,{data}">'
            parts.append(f"<figure>{media}{caption}</figure>")
        parts.append("</div>")
    return (f"<h2>Samples of {html.escape(record.name)}</h2>" + "".join(parts) if parts else ""), room


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]], title: str = "") -> str:
    if not rows:
        return ""
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(c))}</td>" for c in row) + "</tr>" for row in rows)
    heading = f"<h2>{html.escape(title)}</h2>" if title else ""
    return f"{heading}<table><tr>{top}</tr>{body}</table>"


def _short(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def _colour(number: int) -> str:
    return _COLOURS[number % len(_COLOURS)]
