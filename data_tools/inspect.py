"""Inspect shards: one HTML page with pictures, captions and histograms, and their use by a configuration.

    python -m data_tools.inspect SHARD [SHARD ...] out=page.html [run_dir=RUN] [samples=48]
        [fps=16 max_frames=81 max_pixels=102400 multiple=16 temporal_stride=4]
    python -m data_tools.inspect [SHARD ...] out=page.html experiment=NAME [key=value ...] [samples=48]

The page needs no network and no other file. Tokens and cuts are those of the run at `run_dir`, or of the given values:
`multiple` is the side of a token in pixels, `temporal_stride` the frames per latent frame. With `experiment=NAME` they
are those of that configuration, any key of which can be overridden. The page then also shows the samples that it leaves
out of each source, with the causes, and how it packs the others; by default the shards are its own. Shards without an
index are indexed first.
"""

from __future__ import annotations

import base64
import html
import io
import sys
from collections import Counter
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_tools.configured import report
from sora_train.config.cost import geometry
from sora_train.config.hydra import run_hydra
from sora_train.config.load import load
from sora_train.config.registry import METHODS
from sora_train.config.schema import Config, DataConfig, SourceConfig, StageConfig, clip_rate
from sora_train.core.cli import InputError, choice, number, options_and_overrides, options_and_paths, run
from sora_train.data.index.index import Index, expand, index_shards, load_index
from sora_train.data.index.side_tables import SideTables
from sora_train.data.order.visits import cuts
from sora_train.data.read.decode import DecodeError
from sora_train.data.read.encoded import LATENT
from sora_train.data.read.pool import Pool
from sora_train.data.read.store import Store
from sora_train.data.shards import Shards

_SIDE = 192  # pixels of a thumbnail's longer side
_STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #6b7280; --line: #e3e5e8; --bar: #4f7cac; --bad: #b3452f;
  --page: #fbfbfa; --card: #fff }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e6e3; --soft: #9aa0a6; --line: #33363b; --bar: #7aa5d2;
  --bad: #e08a76; --page: #17181a; --card: #1f2124 } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); margin: 2rem auto;
  max-width: 72rem; padding: 0 1rem }
h1 { font-size: 1.5rem; margin: 0 } h2 { font-size: 1.05rem; margin: 2rem 0 .6rem } p, small { color: var(--soft) }
.row { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1rem }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .7rem; overflow: hidden }
.card img { width: 100%; border-radius: 4px; display: block; image-rendering: auto }
.card p { margin: .5rem 0 .2rem; color: var(--ink); overflow-wrap: anywhere; max-height: 6em; overflow: auto }
svg { width: 100%; height: 7rem } svg.wide { height: auto }
svg rect { fill: var(--bar) } svg text { fill: var(--soft); font-size: 9px }
table { border-collapse: collapse } td, th { text-align: left; padding: .2rem 1.2rem .2rem 0; vertical-align: top;
  border-bottom: 1px solid var(--line) } .bad { color: var(--bad) }
"""


@dataclass
class View:
    """View of a configuration on a sample."""

    fps: float = number(16.0, above=0)
    max_frames: int = number(81, least=1)
    max_pixels: int = number(102400, least=1)
    multiple: int = number(16, least=1)
    temporal_stride: int = number(4, least=1)
    fit: str = choice(("crop", "stretch"), "crop")
    max_tokens: int = number(1 << 40, least=1)


@dataclass(kw_only=True)
class Page:
    """The page to write."""

    out: str
    samples: int = number(48, least=0)


@dataclass(kw_only=True)
class Options(Page, View):
    """Options of the command beside shards, where no configuration is composed."""

    run_dir: str | None = None


def main() -> int:
    """Write the page that the command line asks for."""
    if any(argument.startswith("experiment=") for argument in sys.argv[1:]):
        page = options_and_overrides(Page, __doc__, "runs/inspected")
        named = [argument for argument in sys.argv[1:] if "=" not in argument]
        sys.argv[1:] = [argument for argument in sys.argv[1:] if "=" in argument]
        return run_hydra(lambda config: _inspect(config, named, Path(page.out), page.samples), need_vae=False)
    o, patterns = options_and_paths(Options, __doc__)
    if not patterns:
        raise InputError("give shards or experiment=NAME; --help shows the rest")
    store = Store.of(DataConfig())
    shards = expand(patterns, store)
    index_shards(shards, None, store)
    config = load(o.run_dir) if o.run_dir is not None else None
    captioned = config is None or METHODS.get(config.method).reads_captions
    view = View(**{field.name: getattr(o, field.name) for field in fields(View)}) if config is None else view_of(config)
    index = load_index(shards, store, captioned=captioned)
    with Pool(store=store) as pool:
        _write(Path(o.out), render(index, view, pool, o.samples), index)
    return 0


def _inspect(config: Config, patterns: list[str], out: Path, samples: int) -> int:
    """Write the page of a configuration, over its own shards or over those named."""
    config.data.validation = []
    if patterns:
        config.data.sources = {"shards": SourceConfig(patterns)}
        for stage in config.data.stages:
            stage.weights = {}
    shards = Shards(config)
    shards.index()
    index = load_index(shards.training, shards.store, captioned=shards.captioned)
    index = SideTables(config.data.side_tables, shards.store).join(index)
    part = report(config, index, shards.source_of, shards.filters)
    with Pool.of(config.data, shards.store) as pool:
        _write(out, render(index, view_of(config), pool, samples, part), index)
    return 0


def _write(out: Path, page: str, index: Index) -> None:
    try:
        out.write_text(page, encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write out={out}: {error.strerror}") from error
    print(f"wrote {out}: {int(index.usable.sum())} usable samples of {len(index)}")


def view_of(config: Config) -> View:
    """View of a configuration on a sample; in the first stage of training, where there are several."""
    d, grid = config.data, geometry(config)
    stage = d.stages[0] if d.stages else StageConfig()
    return View(
        clip_rate(stage.fps or d.fps), stage.max_frames or d.max_frames, stage.max_pixels or d.max_pixels,
        grid.multiple, grid.temporal_stride, d.fit.value, d.max_tokens,
    )  # fmt: skip


def seen(index: Index, view: View) -> dict[str, np.ndarray]:
    """Of each usable sample: `frames` and `tokens` of its longest clip, and the share of its seconds in that clip."""
    rows = np.flatnonzero(index.usable)
    cut = cuts(index, rows, **asdict(view))
    return {"frames": cut.frames, "tokens": cut.tokens, "share": cut.frames / cut.available}


def render(index: Index, view: View, pool: Pool, samples: int, part: str = "") -> str:
    """The page; `part` is what `configured.report` says."""
    rows = np.flatnonzero(index.usable)
    made = seen(index, view)
    moving = index.fps[rows] > 0
    c = {name: index.columns[name][rows] for name in ("duration", "width", "height", "fps", "caption_chars")}
    charts = [
        ("duration of videos, seconds", c["duration"][moving]),
        ("frames a second", c["fps"][moving]),
        ("height, pixels", c["height"]),
        ("width, pixels", c["width"]),
        ("longest caption, characters", c["caption_chars"]),
        ("tokens of a clip", made["tokens"]),
    ]
    hours = c["duration"].sum() / 3600
    head = (
        f"<h1>{len(index.shards)} shard{'s' * (len(index.shards) != 1)}, {len(rows):,} usable samples</h1>"
        f"<p>{int(moving.sum()):,} videos ({hours:.2f} hours), {int((~moving).sum()):,} images, "
        f"{index.size[rows].sum() / 2**20:,.1f} MiB of media</p>"
    )
    chosen = rows[np.linspace(0, len(rows) - 1, min(samples, len(rows))).astype(int)]
    body = [
        head,
        "<h2>Distributions</h2><div class=row>",
        *(f"<div class=card><small>{title}</small>{histogram(values)}</div>" for title, values in charts),
        "</div>",
        _dropped(index, view, made, c["duration"], moving),
        part,
        "<h2>Samples</h2><div class=row>",
        *(_card(index, int(row), pool) for row in chosen),
        "</div>",
    ]
    title = "<!doctype html><html lang=en><meta charset=utf-8><title>shards</title>"
    return f"{title}<meta name=viewport content='width=device-width'><style>{_STYLE}</style>{''.join(body)}</html>\n"


def histogram(values: np.ndarray, bins: int = 24) -> str:
    """A bar chart as SVG, with its extremes and median."""
    if not len(values):
        return "<p>none</p>"
    low, high = float(values.min()), float(values.max())
    counts, _ = np.histogram(values, bins, (low, high if high > low else low + 1))
    bars = "".join(
        f"<rect x={10 * n} y={80 - 78 * count / counts.max():.1f} width=9 height={78 * count / counts.max():.1f}>"
        f"<title>{count}</title></rect>"
        for n, count in enumerate(counts)
    )
    text = f"<text x=0 y=94>{low:,.4g}</text><text x={10 * bins} y=94 text-anchor=end>{high:,.4g}</text>"
    middle = f"<text x={5 * bins} y=94 text-anchor=middle>median {float(np.median(values)):,.4g}</text>"
    return f"<svg viewBox='0 0 {10 * bins} 98' preserveAspectRatio=none role=img>{bars}{text}{middle}</svg>"


def _dropped(index: Index, view: View, made: dict[str, np.ndarray], seconds: np.ndarray, moving: np.ndarray) -> str:
    causes = Counter(index.columns["refused"][~index.usable].tolist())
    details = {str(c): str(d) for c, d in zip(index.columns["refused"], index.columns["detail"], strict=True)}
    refused = "".join(
        f"<tr><td class=bad>{html.escape(cause)}</td><td>{count}</td><td>{html.escape(details[cause][:160])}</td></tr>"
        for cause, count in causes.most_common()
    )
    total = seconds[moving].sum()
    kept = (seconds * made["share"])[moving].sum() / total if total else 1.0
    whole = float((made["share"][moving] == 1).mean()) if moving.any() else 1.0
    figures = ", ".join(f"{key} {value}" for key, value in asdict(view).items())
    return (
        f"<h2>With this configuration</h2><p>{html.escape(figures)}</p><table>"
        f"<tr><td>samples that can't be used</td><td>{causes.total():,} of {len(index):,}</td><td></td></tr>{refused}"
        f"<tr><td>seconds of video in one visit of each</td><td>{kept:.1%}</td>"
        f"<td>{whole:.1%} of the videos whole</td></tr>"
        f"<tr><td>videos that become one frame</td><td>{int((made['frames'][moving] == 1).sum()):,}</td><td></td></tr>"
        f"<tr><td>tokens of an epoch</td><td>{int(made['tokens'].sum()):,}</td><td></td></tr></table>"
    )


def _card(index: Index, row: int, pool: Pool) -> str:
    """A sample: the frame in its middle, what it is, and its captions."""
    names = ("frames", "fps", "width", "height", "duration", "codec")
    c: dict[str, Any] = {name: index.columns[name][row] for name in names}
    key = html.escape(str(index.key[row]))
    scale = min(1.0, _SIDE / max(c["width"], c["height"]))
    size = max(1, round(c["height"] * scale)), max(1, round(c["width"] * scale))
    image = ""
    try:
        path, extension, member = index.member(row)
        wanted = [int(c["frames"]) // 2]
        if extension != LATENT:  # which have no picture
            picture = pool.decode(path, extension, member, wanted, size, (0, 0, *size), index.track(row)).result()[0]
            image = _picture(picture)
        captions = [] if index.columns["refused"][row] else index.captions(row)[0]  # usable without one: a VAE's
    except DecodeError as error:
        return f"<div class=card><p class=bad>{html.escape(str(error))}</p><small>{key}</small></div>"
    said = "<br>".join(html.escape(caption) for caption in captions)
    about = f"{key}<br>{c['width']}x{c['height']}, {c['frames']} frames, {html.escape(str(c['codec']))}"
    about += f", {c['fps']:.4g} fps, {c['duration']:.2f} s" if c["fps"] else ""
    return f"<div class=card>{image}<p>{said}</p><small>{about}</small></div>"


def _picture(pixels_HWC: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels_HWC).save(buffer, "JPEG", quality=80)
    return f"<img alt='' src='data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}'>"


if __name__ == "__main__":
    run(main)
