"""Self-contained HTML pages: one style, Jinja2 templates, embedded videos."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

STYLE = """
:root { color-scheme: light dark; --line: #8884; }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1320px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem; border-bottom: 1px solid var(--line) }
.grid { display: flex; flex-wrap: wrap; gap: 1rem } figure { margin: 0 }
figcaption { font-size: .85rem; max-width: 420px }
table { border-collapse: collapse; font-size: .88rem } td, th { padding: .15rem .7rem .15rem 0; text-align: left;
vertical-align: top; border-bottom: 1px solid var(--line) }
video, img.sample { width: 200px; image-rendering: pixelated }
svg text { fill: currentColor; font-size: 11px } svg rect { fill: #4269d0 }
.bad { color: #c2415b }
.key { display: inline-block; width: 1em; height: .7em; margin: 0 .3em }
"""

_BASE = """<!doctype html><html lang=en><head><meta charset=utf-8>
<meta name=viewport content="width=device-width"><title>{{ title }}</title><style>{{ style }}</style></head><body>
<h1>{{ title }}</h1>
{{ body }}
</body></html>
"""
_TYPES = {".mp4": "video/mp4", ".webm": "video/webm", ".mov": "video/mp4", ".m4v": "video/mp4", ".png": "image/png"}


def page(title: str, template: str, values: Mapping[str, Any]) -> str:
    """Render a complete HTML page from a Jinja2 template for its body; `values` are escaped."""
    from markupsafe import Markup

    body = Markup(_environment().from_string(template).render(**values))  # noqa: S704  (escaped when it was rendered)
    return _environment().from_string(_BASE).render(title=title, style=Markup(STYLE), body=body)


def embedded(path: Path) -> str:
    """Encode a file as a data URI, for the attribute `src`."""
    return f"data:{_TYPES[path.suffix.lower()]};base64,{base64.b64encode(path.read_bytes()).decode()}"


@cache
def _environment() -> Environment:
    return Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
