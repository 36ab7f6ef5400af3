"""The report of a curation as one HTML page: yields, histograms with thresholds, pictures of kept and dropped clips."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.curation.clips import sample_name
from data_tools.curation.ledger import write_text
from data_tools.curation.pipeline import Curated, Pipeline
from data_tools.curation.scores import COLUMNS
from data_tools.curation.stage import Item
from data_tools.media_files import key_of
from sora_train.core.page import page

_EACH = 8  # pictures for each reason
_PAIRS = 12
_BINS, _WIDTH, _HEIGHT = 40, 300, 110
_LOG = ("motion", "sharpness")  # scores that spread over powers of ten
_TEMPLATE = """
<p>{{ films }} films used, {{ scored }} clips with scores, {{ stored }} in shards{% if seconds %}, {{ seconds }} of
footage kept{% endif %}. Rule: <code>{{ rule }}</code></p>
{% for alarm in alarms %}<p><b>Note:</b> {{ alarm }}</p>{% endfor %}
<h2>Stages</h2>
<table><tr><th>stage</th><th>given</th><th>kept</th><th></th><th>left out</th></tr>
{% for line in yields %}<tr><td>{{ line.stage }}</td><td>{{ line.given }} {{ line.unit }}s</td><td>{{ line.kept }}</td>
<td>{{ "%.0f%%"|format(100 * line.kept / line.given) if line.given }}</td>
<td>{% for reason, n in (line.dropped + line.failed).most_common() %}{{ n }} {{ reason }}{{ ", " if not loop.last }}
{% endfor %}</td></tr>{% endfor %}
</table>
<h2>Scores</h2><div class=grid>
{% for h in histograms %}<figure><svg viewBox="0 0 {{ width }} {{ height }}" width={{ width }} height={{ height }}
role=img aria-label="{{ h.name }}">
{% for bar in h.bars %}<rect x={{ bar.x }} y={{ bar.y }} width={{ bar.w }} height={{ bar.h }} />
{% endfor %}
{% for x in h.thresholds %}<line x1={{ x }} x2={{ x }} y1=0 y2={{ height - 16 }} stroke="#e4572e" stroke-width=1.6 />
{% endfor %}<text x=2 y={{ height - 3 }}>{{ h.low }}</text>
<text x={{ width - 2 }} y={{ height - 3 }} text-anchor=end>{{ h.high }}</text></svg>
<figcaption>{{ h.name }}{{ " (log)" if h.log }}: {{ h.count }} clips{{ ", " ~ h.told if h.told }}</figcaption></figure>
{% endfor %}</div>
{% for group in groups %}<h2>{{ group.title }}: {{ group.count }}</h2><div class=grid>
{% for clip in group.clips %}<figure><img src="{{ clip.src }}" alt="{{ clip.name }}" height=96>
<figcaption>{{ clip.name }}<br>{{ clip.note }}</figcaption></figure>{% endfor %}</div>{% endfor %}
{% if pairs %}<h2>Near-duplicates: left out, or to look at</h2><table><tr><th>clip</th><th></th><th>near</th><th></th>
<th>bits of 64</th><th></th></tr>
{% for p in pairs %}<tr><td><img src="{{ p.src }}" height=64 alt=""></td><td>{{ p.key }}</td>
<td><img src="{{ p.other_src }}" height=64 alt=""></td><td>{{ p.other }}</td><td>{{ p.bits }}</td>
<td>{{ p.verdict }}</td></tr>
{% endfor %}</table>{% endif %}
<h2>Licences</h2><table><tr><th>source</th><th>licence</th><th>films</th><th>consent</th><th>commercial use</th>
<th>obtained</th></tr>
{% for r in licences %}<tr><td>{{ r.id }}</td><td>{{ r.licence }}</td><td>{{ r.count }}</td><td>{{ r.consent }}</td>
<td>{{ "yes" if r.commercial else "no" }}</td><td>{{ r.obtained }} {{ r.url }}</td></tr>{% endfor %}</table>
{% if others %}<h2>Left out before they were looked at</h2><table><tr><th>film</th><th>stage</th><th>reason</th></tr>
{% for e in others %}<tr><td>{{ e.film }}</td><td>{{ e.stage }}</td><td>{{ e.reason }} {{ e.detail }}</td></tr>
{% endfor %}
</table>{% endif %}
"""


def write_report(path: Path, pipeline: Pipeline, done: Curated) -> None:
    """Write the page of a run."""
    pictures = _Pictures(pipeline.out, done)
    clips = [clip for clip in done.clips if not done.stored or clip["key"] in done.stored]
    seconds = sum((clip["end"] - clip["start"]) / clip["fps"] for clip in clips)
    values = {
        "films": len(done.films), "scored": len(done.clips), "stored": len(done.stored), "rule": pipeline.rule.text,
        "seconds": f"{seconds / 60:.1f} minutes", "alarms": done.outcomes.alarms, "yields": done.outcomes.yields,
        "histograms": [h for name in COLUMNS if (h := _histogram(name, done.clips, pipeline.rule.thresholds()))],
        "groups": _groups(done, pictures), "pairs": _pairs(done, pictures), "licences": _licences(done.films),
        "others": [e for e in done.outcomes.entries if e["unit"] == "film"][:500], "width": _WIDTH, "height": _HEIGHT,
    }  # fmt: skip
    write_text(path, page("Curated footage", _TEMPLATE, values))


class _Pictures:
    """Thumbnails of clips as data URIs, from the results of the stage `look`."""

    def __init__(self, out: Path, done: Curated) -> None:
        self._folder, self._films = out / "work" / "look", {film["sha256"]: film for film in done.films}
        self._open: tuple[str, Mapping[str, np.ndarray]] = ("", {})

    def of(self, film_sha256: str, frame: int) -> str:
        """The picture nearest to a frame of a film."""
        if self._open[0] != film_sha256:
            seen = np.load(self._folder / self._films[film_sha256]["look"])
            self._open = film_sha256, {n: seen[n] for n in ("at", "thumbnails", "thumbnail_ends")}
        seen = self._open[1]
        number = int(np.abs(seen["at"] - frame).argmin())
        first = int(seen["thumbnail_ends"][number - 1]) if number else 0
        data = seen["thumbnails"][first : int(seen["thumbnail_ends"][number])].tobytes()
        return f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"


def _groups(done: Curated, pictures: _Pictures) -> list[dict[str, Any]]:
    """Groups of pictures for the template: of clips that were kept, and of those that were dropped for each reason."""
    shots = {key_of(sample_name(film, shot)): (film, shot) for film in done.films for shot in film["shots"]}
    by_reason: dict[str, list[tuple[str, str]]] = {}
    for entry in done.outcomes.entries:
        if entry["unit"] == "clip" and entry["id"] in shots:
            by_reason.setdefault(f"{entry['reason']}", []).append((entry["id"], entry["detail"]))
    left_out = {key for found in by_reason.values() for key, _ in found}
    kept = [(clip["key"], _note(clip)) for clip in done.clips if clip["key"] not in left_out]
    groups = []
    for title, found in [("Kept", kept), *((f"Dropped: {r}", f) for r, f in sorted(by_reason.items()))]:
        places = sorted({round(place) for place in np.linspace(0, max(0, len(found) - 1), min(_EACH, len(found)))})
        clips = []
        for key, note in (found[place] for place in places):
            film, shot = shots[key]
            src = pictures.of(film["sha256"], (shot["start"] + shot["end"]) // 2)
            name = f"{film['name']} {shot['start'] / film['fps']:.1f} to {shot['end'] / film['fps']:.1f} s"
            clips.append({"src": src, "name": name, "note": note})
        groups.append({"title": title, "count": len(found), "clips": clips})
    return groups


def _note(clip: Item) -> str:
    return ", ".join(f"{name} {clip[name]:.3g}" for name in ("motion", "sharpness") if clip[name] is not None)


def _pairs(done: Curated, pictures: _Pictures) -> list[dict[str, Any]]:
    by_key = {clip["key"]: clip for clip in done.clips}
    found = []
    for verdict, pairs in (("left out", done.near.dropped), ("to look at", done.near.to_review)) if done.near else ():
        for key, (other, bits) in list(pairs.items())[:_PAIRS]:
            sources = [
                pictures.of(by_key[k]["sha256"], (by_key[k]["start"] + by_key[k]["end"]) // 2) for k in (key, other)
            ]
            found.append(
                {
                    "key": key,
                    "other": other,
                    "bits": bits,
                    "verdict": verdict,
                    "src": sources[0],
                    "other_src": sources[1],
                }
            )
    return found


def _licences(films: Sequence[Item]) -> list[dict[str, Any]]:
    rights = {film["source"]: film["rights"] for film in films}
    counts = [film["source"] for film in films]
    return [{**rights[name], "count": counts.count(name)} for name in sorted(rights)]


def _histogram(name: str, clips: Sequence[Item], thresholds: Mapping[str, Sequence[float]]) -> dict[str, Any] | None:
    """Histogram of a score for the template: bars, and positions of the rule's thresholds; None without values."""
    values = np.array([clip[name] for clip in clips if clip[name] is not None], dtype=np.float64)
    if not len(values):
        return None
    told = list(thresholds.get(name, ()))
    log = name in _LOG
    floor = min([value for value in (*values, *told) if value > 0], default=1e-6)
    place = (lambda value: np.log10(np.maximum(value, floor))) if log else np.asarray
    spread = place(np.concatenate([values, told]))
    low, high = float(spread.min()), float(spread.max())
    high = high if high > low else low + 0.1 * max(1.0, abs(low))
    counts = np.histogram(place(values), _BINS, (low, high))[0]
    step, room = _WIDTH / _BINS, _HEIGHT - 18
    bars = [
        {"x": round(n * step, 1), "w": round(step - 0.6, 1), "h": round(room * count / counts.max(), 1),
         "y": round(room - room * count / counts.max(), 1)}
        for n, count in enumerate(counts.tolist()) if count
    ]  # fmt: skip
    ends = (10**low, 10**high) if log else (low, high)
    return {
        "name": name, "bars": bars, "low": f"{ends[0]:.3g}", "high": f"{ends[1]:.3g}", "log": log, "count": len(values),
        "thresholds": [round(float((place(value) - low) / (high - low) * _WIDTH), 1) for value in told],
        "told": " and ".join(f"{value:g}" for value in told),
    }  # fmt: skip
