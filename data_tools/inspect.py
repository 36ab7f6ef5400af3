"""Inspect shards: one HTML page with pictures, captions and histograms, and their use by a configuration.

    python -m data_tools.inspect SHARD [SHARD ...] out=page.html [run_dir=RUN] [samples=48]
        [fps=16 max_frames=81 max_pixels=102400 multiple=16 temporal_stride=4]
    python -m data_tools.inspect [SHARD ...] out=page.html experiment=NAME [key=value ...] [samples=48]

The page needs no network and no other file. Tokens and cuts are computed for the run at `run_dir`, or for the given
values: `multiple` is the side of a token in pixels, `temporal_stride` the frames per latent frame. With
`experiment=NAME` they are computed for that configuration, any key of which can be overridden. The page then also shows
which samples the configuration leaves out of each source, with the causes, and how it packs the others; by default the
shards are those of the configuration. Shards without an index are indexed first.
"""

from __future__ import annotations

import base64
import io
import sys
from collections import Counter
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from PIL import Image

from data_tools.configured import report
from sora_train.config.cost import geometry
from sora_train.config.hydra import run_hydra
from sora_train.config.load import load
from sora_train.config.registry import METHODS
from sora_train.config.schema import Config, DataConfig, SourceConfig, StageConfig, clip_rate
from sora_train.core.charts import histogram
from sora_train.core.cli import InputError, run
from sora_train.core.options import choice, number, options_and_overrides, options_and_paths
from sora_train.core.outputs import usable
from sora_train.core.page import page
from sora_train.data.index.index import Index, load_index
from sora_train.data.index.make import index_shards
from sora_train.data.index.patterns import expand
from sora_train.data.index.side_tables import SideTables
from sora_train.data.order.visits import cuts
from sora_train.data.read.decode import DecodeError
from sora_train.data.read.encoded import LATENT
from sora_train.data.read.pool import Pool
from sora_train.data.read.store import Store
from sora_train.data.shards import Shards

_SIDE = 192  # pixels of a thumbnail's longer side
_TEMPLATE = """
<p>{{ videos }} videos ({{ hours }} hours), {{ images }} images, {{ mib }} MiB of media</p>
<h2>Distributions</h2><div class=grid>{% for chart in charts %}{{ chart }}{% endfor %}</div>
<h2>With this configuration</h2><p>{{ view }}</p><table>
<tr><td>samples that can't be used</td><td>{{ unusable }}</td><td></td></tr>
{% for cause, count, detail in refused %}
<tr><td class=bad>{{ cause }}</td><td>{{ count }}</td><td>{{ detail }}</td></tr>{% endfor %}
{% for name, value, detail in uses %}<tr><td>{{ name }}</td><td>{{ value }}</td><td>{{ detail }}</td></tr>{% endfor %}
</table>
{{ part }}
<h2>Samples</h2><div class=grid>{% for card in cards %}<figure>
{% if card.picture %}<img alt="" src="{{ card.picture }}">{% endif %}
{% if card.refused %}<p class=bad>{{ card.refused }}</p>{% endif %}
<figcaption>{% for line in card.lines %}{{ line }}<br>{% endfor %}</figcaption></figure>
{% endfor %}</div>
"""


@dataclass
class View:
    """The values of a configuration that determine a sample's clip."""

    fps: float = number(16.0, above=0)
    max_frames: int = number(81, least=1)
    max_pixels: int = number(102400, least=1)
    multiple: int = number(16, least=1)
    temporal_stride: int = number(4, least=1)
    fit: str = choice(("crop", "stretch"), "crop")
    max_tokens: int = number(1 << 40, least=1)


@dataclass(kw_only=True)
class Page:
    """Options of the page."""

    out: str
    samples: int = number(48, least=0)


@dataclass(kw_only=True)
class Options(Page, View):
    """Options of the command without `experiment=`, apart from the shards."""

    run_dir: str | None = None


def main() -> int:
    """Write the page that the command line asks for."""
    if any(argument.startswith("experiment=") for argument in sys.argv[1:]):
        asked = options_and_overrides(Page, __doc__, "runs/inspected")
        named = [argument for argument in sys.argv[1:] if "=" not in argument]
        sys.argv[1:] = [argument for argument in sys.argv[1:] if "=" in argument]
        return run_hydra(lambda config: _inspect(config, named, Path(asked.out), asked.samples), need_vae=False)
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
    """Write the page of a configuration, on its own training shards or on those given."""
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


def _write(out: Path, text: str, index: Index) -> None:
    with usable(out, "out"):
        out.write_text(text, encoding="utf-8")
    print(f"wrote {out}: {int(index.usable.sum())} usable samples of {len(index)}")


def view_of(config: Config) -> View:
    """View of a configuration; of its first training stage, if it has several."""
    d, grid = config.data, geometry(config)
    stage = d.stages[0] if d.stages else StageConfig()
    return View(
        clip_rate(stage.fps or d.fps), stage.max_frames or d.max_frames, stage.max_pixels or d.max_pixels,
        grid.multiple, grid.temporal_stride, d.fit.value, d.max_tokens,
    )  # fmt: skip


def seen(index: Index, view: View) -> dict[str, np.ndarray]:
    """Arrays over the usable samples: `frames` and `tokens` of the longest clip, and its `share` of the duration."""
    rows = np.flatnonzero(index.usable)
    cut = cuts(index, rows, **asdict(view))
    return {"frames": cut.frames, "tokens": cut.tokens, "share": cut.frames / cut.available}


def render(index: Index, view: View, pool: Pool, samples: int, part: str = "") -> str:
    """Render the page with pictures of `samples` samples. `part` is the HTML of `configured.report`."""
    rows = np.flatnonzero(index.usable)
    made = seen(index, view)
    moving = index.fps[rows] > 0
    c = {name: index.columns[name][rows] for name in ("duration", "width", "height", "fps", "caption_chars")}
    charts = {
        "duration of videos, seconds": c["duration"][moving], "frames a second": c["fps"][moving],
        "height, pixels": c["height"], "width, pixels": c["width"],
        "longest caption, characters": c["caption_chars"], "tokens of a clip": made["tokens"],
    }  # fmt: skip
    chosen = rows[np.linspace(0, len(rows) - 1, min(samples, len(rows))).astype(int)]
    causes = Counter(index.columns["refused"][~index.usable].tolist())
    details = {str(c): str(d) for c, d in zip(index.columns["refused"], index.columns["detail"], strict=True)}
    values = {
        "videos": f"{int(moving.sum()):,}", "images": f"{int((~moving).sum()):,}",
        "hours": f"{c['duration'].sum() / 3600:.2f}", "mib": f"{index.size[rows].sum() / 2**20:,.1f}",
        "charts": [histogram(name, values) for name, values in charts.items()],
        "view": ", ".join(f"{key} {value}" for key, value in asdict(view).items()),
        "unusable": f"{causes.total():,} of {len(index):,}",
        "refused": [(cause, count, details[cause][:160]) for cause, count in causes.most_common()],
        "uses": _uses(made, c["duration"], moving), "part": Markup(part),  # noqa: S704  (escaped where it was made)
        "cards": [_card(index, int(row), pool) for row in chosen],
    }  # fmt: skip
    shards = f"{len(index.shards)} shard{'s' * (len(index.shards) != 1)}"
    return page(f"{shards}, {len(rows):,} usable samples", _TEMPLATE, values)


def _uses(made: dict[str, np.ndarray], seconds: np.ndarray, moving: np.ndarray) -> list[tuple[str, str, str]]:
    """Table rows on how much of the samples the view uses: name, value, detail."""
    total = seconds[moving].sum()
    kept = (seconds * made["share"])[moving].sum() / total if total else 1.0
    whole = float((made["share"][moving] == 1).mean()) if moving.any() else 1.0
    return [
        ("seconds of video in one visit of each", f"{kept:.1%}", f"{whole:.1%} of the videos whole"),
        ("videos that become one frame", f"{int((made['frames'][moving] == 1).sum()):,}", ""),
        ("tokens of an epoch", f"{int(made['tokens'].sum()):,}", ""),
    ]


def _card(index: Index, row: int, pool: Pool) -> dict[str, Any]:
    """Values of a sample's card: its middle frame as a data URI, its captions, key and format."""
    names = ("frames", "fps", "width", "height", "duration", "codec")
    c: dict[str, Any] = {name: index.columns[name][row] for name in names}
    key, picture = str(index.key[row]), ""
    scale = min(1.0, _SIDE / max(c["width"], c["height"]))
    size = max(1, round(c["height"] * scale)), max(1, round(c["width"] * scale))
    try:
        path, extension, member = index.member(row)
        wanted = [int(c["frames"]) // 2]
        if extension != LATENT:  # latents have no picture
            pixels = pool.decode(path, extension, member, wanted, size, (0, 0, *size), track=index.track(row)).result()[
                0
            ]
            picture = _picture(pixels)
        captions = [] if index.columns["refused"][row] else index.captions(row)[0]  # a VAE's may have none
    except DecodeError as error:
        return {"picture": "", "refused": str(error), "lines": [key]}
    about = f"{c['width']}x{c['height']}, {c['frames']} frames, {c['codec']}"
    about += f", {c['fps']:.4g} fps, {c['duration']:.2f} s" if c["fps"] else ""
    return {"picture": picture, "refused": "", "lines": [*captions, key, about]}


def _picture(pixels_HWC: np.ndarray) -> str:
    """A picture as a data URI."""
    buffer = io.BytesIO()
    Image.fromarray(pixels_HWC).save(buffer, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


if __name__ == "__main__":
    run(main)
