"""An evaluation as one HTML page: figures, distances, curves over checkpoints, worst and best samples with players."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sora_train.core.charts import COLOURS, curve_chart
from sora_train.core.page import embedded, page
from sora_train.evaluation.outcome import Outcome
from sora_train.evaluation.results import Judged, Row, cell

Curves = Mapping[str, Sequence[tuple[int, float]]]  # figure -> (step, value)
_EACH = 3  # samples at either end
_MEDIA_BYTES = 24 << 20  # of videos in one page; later ones are named, not shown

_TEMPLATE = """
<p>{% for key, value in about.items() if value %}
{{ key }}: <b>{{ value }}</b>{{ ", " if not loop.last }}{% endfor %}</p>
<h2>Figures with 95% intervals</h2>
<table><tr><th>figure</th>{% for column in columns %}<th>{{ column }}</th>{% endfor %}<th>chance</th></tr>
{% for row in rows %}<tr><td>{{ row.name }}{{ arrows[row.better] }}</td>
{% for column in columns %}<td>{{ cell(row.cells[column], row.summary) if column in row.cells }}</td>{% endfor %}
<td>{{ "%.1f%%"|format(100 * row.chance) if row.chance is not none }}</td></tr>{% endfor %}
</table>
{% if distances.values()|select|list %}<h2>Distances from the real videos</h2>
<table><tr><th>distance</th><th>videos</th><th>value</th><th>real from real (floor)</th><th>n</th></tr>
{% for column, figures in distances.items() %}{% for f in figures %}<tr><td>{{ f.name }}</td><td>{{ column }}</td>
<td>{{ spread(f.made) }}</td><td>{{ spread(f.floor) }}</td><td>{{ f.made.n }}</td></tr>{% endfor %}{% endfor %}
</table>{% endif %}
{% if charts %}<h2>Over checkpoints</h2><div class=grid>{% for chart in charts %}{{ chart }}{% endfor %}</div>
{% endif %}
{% for end in ends %}<h2>{{ end.title }}</h2><div class=grid>
{% for video in end.videos %}<figure>
{% if video.src.startswith("data:image") %}<img class=sample alt="" src="{{ video.src }}">
{% elif video.src %}<video controls loop muted playsinline src="{{ video.src }}"></video>
{% else %}<p>{{ video.name }}</p>{% endif %}<figcaption>{{ video.value }} {{ video.caption }}</figcaption></figure>
{% endfor %}</div>{% endfor %}
{% if skipped %}<h2>Left out</h2><ul>{% for line in skipped %}<li>{{ line }}</li>{% endfor %}</ul>{% endif %}
"""


@dataclass
class _Media:
    """Videos and images by the name of the sample, embedded in the page up to a total size."""

    files: Mapping[str, Path]
    room: int = _MEDIA_BYTES

    def source(self, name: str) -> str:
        """Return the data URI of a video or image; empty if it doesn't exist or there is no room left."""
        path = self.files.get(name)
        if path is None or not path.is_file() or path.stat().st_size > self.room:
            return ""
        self.room -= path.stat().st_size
        return embedded(path)


def evaluation_page(outcome: Outcome, files: Mapping[str, Path], curves: Curves | None = None) -> str:
    """Render the page of an evaluation as HTML.

    Args:
        outcome: The evaluation.
        files: Paths of the judged videos by name.
        curves: Values over checkpoints by figure, if there are any.
    """
    media, judged = _Media(files), next(iter(outcome.columns.values()))
    ends = [end for row in outcome.rows if row.better for end in _ends(row, judged, media)]
    values = {
        "about": outcome.about, "columns": list(outcome.columns), "rows": outcome.rows, "cell": cell, "ends": ends,
        "arrows": {"up": " \u2191", "down": " \u2193", None: ""}, "distances": outcome.distances, "spread": _spread,
        "charts": [curve_chart(name, [(COLOURS[0], sorted(c))]) for name, c in (curves or {}).items() if len(c) > 1],
        "skipped": outcome.skipped,
    }  # fmt: skip
    return page(outcome.title, _TEMPLATE, values)


def _ends(row: Row, judged: Sequence[Judged], media: _Media) -> list[dict[str, object]]:
    """Select the worst and the best videos of one figure; empty if all have the same value."""
    values = [(f[row.name], video) for video in judged for f in video.figures.values() if row.name in f]
    values.sort(key=lambda pair: pair[0], reverse=row.better == "up")
    if not values or values[0][0] == values[-1][0]:
        return []
    best, worst = values[:_EACH], values[::-1][:_EACH]
    return [
        {
            "title": f"{row.name}: {title}",
            "videos": [
                {"name": v.name, "caption": v.caption, "value": f"{value:.3g}", "src": media.source(v.name)}
                for value, v in chosen
            ],
        }
        for title, chosen in (("worst", worst), ("best", best))
    ]


def _spread(value: object) -> str:
    return f"{value.value:.4g} ({value.low:.3g} to {value.high:.3g})"  # type: ignore[attr-defined]
