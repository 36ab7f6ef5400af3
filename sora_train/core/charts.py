"""Charts as SVG for HTML pages: curves over steps, and histograms."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from markupsafe import Markup, escape

COLOURS = ("#4269d0", "#d9782d", "#3a9b63", "#c2415b", "#8b5cc7", "#2b9aa8", "#8a6d3b", "#666666")
Curve = Sequence[tuple[int, float]]  # step, value
_WIDTH, _HEIGHT, _MARGIN = 420, 190, 8


def curve_chart(name: str, curves: Sequence[tuple[str, Curve]]) -> Markup:
    """Draw curves on one pair of axes as an SVG figure.

    Args:
        name: Caption of the figure.
        curves: (colour, curve) pairs.

    Returns:
        HTML of the figure; empty if no curve has a finite value.
    """
    lines = [(colour, finite(curve)) for colour, curve in curves]
    points = [point for _, curve in lines for point in curve]
    if not points:
        return Markup()
    steps, values = [step for step, _ in points], [value for _, value in points]
    wide, high = max(max(steps) - min(steps), 1), (max(values) - min(values)) or 1.0

    def place(step: int, value: float) -> str:
        x, y = (step - min(steps)) / wide * (_WIDTH - 2 * _MARGIN), (value - min(values)) / high * (_HEIGHT - 40)
        return f"{_MARGIN + x:.1f},{_HEIGHT - 20 - y:.1f}"

    drawn = "".join(
        f'<polyline fill=none stroke="{escape(colour)}" stroke-width=1.6 '
        f'points="{" ".join(place(*point) for point in curve)}"/>'
        for colour, curve in lines
    )
    label, bottom = escape(name), _HEIGHT - 6
    texts = (
        f"<text x={_MARGIN} y=14>{max(values):.4g}</text><text x={_MARGIN} y={bottom}>{min(values):.4g}</text>"
        f"<text x={_WIDTH - _MARGIN} y={bottom} text-anchor=end>step {max(steps)}</text>"
    )
    return Markup(  # noqa: S704  (numbers, and texts that were escaped)
        f'<figure><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width={_WIDTH} height={_HEIGHT} role=img aria-label="{label}">'
        f"{texts}{drawn}</svg><figcaption>{label}</figcaption></figure>"
    )


def finite(curve: Curve) -> list[tuple[int, float]]:
    """Drop the points of a curve that aren't finite."""
    return [(step, value) for step, value in curve if math.isfinite(value)]


def histogram(name: str, values: np.ndarray, bins: int = 24) -> Markup:
    """Draw a histogram of values as an SVG figure, with their minimum, maximum and median; returns its HTML."""
    label = escape(name)
    if not len(values):
        return Markup(f"<figure><p>none</p><figcaption>{label}</figcaption></figure>")  # noqa: S704
    low, high = float(values.min()), float(values.max())
    counts, _ = np.histogram(values, bins, (low, high if high > low else low + 1))
    bars = "".join(
        f"<rect x={10 * n} y={80 - 78 * count / counts.max():.1f} width=9 height={78 * count / counts.max():.1f}>"
        f"<title>{count}</title></rect>"
        for n, count in enumerate(counts)
    )
    texts = (
        f"<text x=0 y=94>{low:,.4g}</text><text x={10 * bins} y=94 text-anchor=end>{high:,.4g}</text>"
        f"<text x={5 * bins} y=94 text-anchor=middle>median {float(np.median(values)):,.4g}</text>"
    )
    return Markup(  # noqa: S704  (numbers, and a text that was escaped)
        f'<figure><svg viewBox="0 0 {10 * bins} 98" width={10 * bins} height=98 role=img aria-label="{label}">'
        f"{bars}{texts}</svg><figcaption>{label}</figcaption></figure>"
    )
