"""HTML page of one or several runs, self-contained: curves, samples, configuration and events."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sora_train.core.charts import COLOURS, curve_chart
from sora_train.core.page import embedded, page
from sora_train.operations.records import Record, differences, events, samples

_MEDIA_BYTES = 24 << 20  # bytes of embedded samples; beyond it only file names are shown
_FIRST = ("loss", "validation_loss", "tokens_per_s", "mfu", "data_wait", "step_time", "grad_norm", "lr")
_TEMPLATE = """
{% macro table(title, head, rows) %}{% if rows %}{% if title %}<h2>{{ title }}</h2>{% endif %}
<table><tr>{% for cell in head %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}</table>
{% endif %}{% endmacro %}
{% if runs|length > 1 %}<p>{% for run in runs %}
<span class=key style="background:{{ run.colour }}"></span>{{ run.name }} &nbsp; {% endfor %}</p>{% endif %}
{{ table("", ["run", "state", "step", "loss", "validation loss", "tokens/s"], ends) }}
<h2>Curves</h2><div class=grid>{% for chart in charts %}{{ chart }}{% endfor %}</div>
{{ table("What differs", ["key"] + runs|map(attribute="name")|list, differing) }}
{% for run in runs %}
{% if run.samples %}<h2>Samples of {{ run.name }}</h2>
{% for step, videos in run.samples %}<h3>step {{ step }}</h3><div class=grid>
{% for video in videos %}<figure>
{% if video.src and video.moves %}<video controls loop muted playsinline src="{{ video.src }}"></video>
{% elif video.src %}<img class=sample alt="" src="{{ video.src }}">
{% else %}{{ video.name }}{% endif %}<figcaption>{{ video.prompt }}</figcaption></figure>
{% endfor %}</div>{% endfor %}{% endif %}
{{ table("Events of " + run.name, ["when", "event"], run.events) }}
{{ table("Data of " + run.name, ["cause", "samples refused"], run.refused) }}
{% endfor %}
{{ table("Configuration", ["key", "value"], configuration) }}
"""


def runs_page(title: str, records: Sequence[Record]) -> str:
    """Generate the page."""
    runs, room = [], _MEDIA_BYTES
    for number, record in enumerate(records):
        shown, room = _samples(record, room)
        runs.append({
            "name": record.name, "colour": _colour(number), "samples": shown, "events": events(record.folder),
            "refused": sorted(record.quarantine.items(), key=lambda item: -item[1]),
        })  # fmt: skip
    several = len(records) > 1
    values = {
        "runs": runs, "ends": [_end(record) for record in records],
        "charts": [_chart(name, records) for name in _names(records)],
        "differing": [[key, *map(_short, v)] for key, v in differences(list(records)).items()] if several else [],
        "configuration": [] if several else [[key, _short(value)] for key, value in records[0].config.items()],
    }  # fmt: skip
    return page(title, _TEMPLATE, values)


def write_report(record: Record) -> Path:
    """Write `report.html` to a run folder."""
    path = record.folder / "report.html"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(runs_page(record.name, [record]), encoding="utf-8")
    temporary.replace(path)
    return path


def _names(records: Sequence[Record]) -> list[str]:
    every = {name for record in records for name, curve in record.curves.items() if len(curve) > 1}
    return [n for n in _FIRST if n in every] + sorted(every - set(_FIRST))


def _end(record: Record) -> list[Any]:
    """Row of a run: its state, its last step and its last figures."""
    steps = max((curve[-1][0] for curve in record.curves.values() if curve), default=0)
    figures = [record.last(name) for name in ("loss", "validation_loss", "tokens_per_s")]
    state = record.end.get("reason", "still running, or killed")
    return [record.name, state, steps, *("" if f is None else f"{f:.4g}" for f in figures)]


def _chart(name: str, records: Sequence[Record]) -> str:
    return curve_chart(name, [(_colour(n), r.curves[name]) for n, r in enumerate(records) if name in r.curves])


def _samples(record: Record, room: int) -> tuple[list[Any], int]:
    """Samples by step, newest first, with their bytes while the budget lasts; and what is left of the budget."""
    steps = []
    for step, clips in sorted(samples(record.folder).items(), reverse=True):
        videos = []
        for prompt, path in clips:
            size = path.stat().st_size
            src = embedded(path) if size <= room else ""
            room -= size if src else 0
            name = str(path.relative_to(record.folder))
            videos.append({"prompt": prompt, "src": src, "name": name, "moves": path.suffix == ".mp4"})
        steps.append((step, videos))
    return steps, room


def _short(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]
