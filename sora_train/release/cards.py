"""Model card, data card and summary of the training content, written from files only.

Figures come from the run: its configuration, checkpoint, metrics, index, ledger, evaluation and red team. Facts that no
file of the run contains (licences, intended use, how data was obtained) come from a YAML file that the owner writes. A
missing fact is an error that names it; no field is left empty.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from sora_train.config.load import load
from sora_train.config.schema import Config
from sora_train.core.cli import InputError
from sora_train.core.lines import entries
from sora_train.core.outputs import usable
from sora_train.data.index.index import load_index
from sora_train.data.index.patterns import expand
from sora_train.data.read.store import Store
from sora_train.evaluation.intervals import Estimate
from sora_train.evaluation.results import SAMPLES, cell
from sora_train.operations.trained import checkpoint_of
from sora_train.release.redteam import REPORT
from sora_train.training.state.checkpoint_format import read_state

CARDS = ("model_card.md", "data_card.md", "training_content.md")
_TEMPLATES = Path(__file__).with_name("templates")
_OF_ALL = (
    "provider", "contact", "name", "version", "released_on", "licence", "intended_use", "not_intended", "limitations",
    "languages", "opt_outs", "illegal_content", "personal_data",
)  # fmt: skip
_OF_A_SOURCE = ("description", "kind", "licence", "obtained", "period", "people")
_EXAMPLE = "facts.example.yaml"


@dataclass
class Options:
    """Options of `cards`."""

    run_dir: str
    facts: str
    out: str
    redteam: str | None = None  # folder of `redteam`; default: the card says that none was done


@dataclass(frozen=True)
class Source:
    """Figures of a source of training data, from its index."""

    name: str
    shards: int
    samples: int
    usable: int
    videos: int
    images: int
    hours: float
    shortest_side: int
    longest_side: int
    mean_caption: float  # characters
    refused: dict[str, int]  # by cause
    licences: dict[str, int]  # of samples whose json has a licence


def main(o: Options) -> int:
    """Write the three cards."""
    facts, config = read_facts(Path(o.facts)), load(o.run_dir)
    sources = [source_of(name, config) for name in config.data.sources]
    missing = [f"sources.{s.name}" for s in sources if s.name not in facts["sources"]]
    if missing:
        raise InputError(f"{o.facts} lacks {missing[0]}: the run was trained on it")
    values = {
        "facts": facts, "sources": sources, "model": _model(o.run_dir, config), "seen": seen(Path(o.run_dir)),
        "evaluation": _evaluation(Path(o.run_dir)), "redteam": _redteam(o.redteam),
    }  # fmt: skip
    out = Path(o.out)
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        autoescape=False,  # Markdown
    )  # fmt: skip
    with usable(out, "out"):
        out.mkdir(parents=True, exist_ok=True)
        for name in CARDS:
            (out / name).write_text(environment.get_template(name).render(**values), encoding="utf-8")
            print(out / name)
    return 0


def read_facts(path: Path) -> dict[str, Any]:
    """Read the facts of a YAML file. Raises InputError that names the first missing fact."""
    try:
        facts = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"facts={path} can't be read: {' '.join(str(error).split())}") from error
    if not isinstance(facts, dict) or not isinstance(facts.get("sources"), dict):
        raise InputError(f"facts={path} must have sources; {_TEMPLATES / _EXAMPLE} shows all fields")
    for name in _OF_ALL:
        _required(facts, name, name, path)
    for source, its in facts["sources"].items():
        for name in _OF_A_SOURCE:
            _required(its, name, f"sources.{source}.{name}", path)
    return facts


def source_of(name: str, config: Config) -> Source:
    """Compute the figures of a source from its index. Raises InputError if its shards or their indexes are missing."""
    store = Store.of(config.data)
    shards = expand(config.data.sources[name].shards, store)
    index = load_index(shards, store, allow_empty=True)
    usable, frames, fps = index.usable, index.columns["frames"], index.columns["fps"]
    video = usable & (frames > 1)
    sides = np.concatenate((index.columns["height"][usable], index.columns["width"][usable]))
    captions = index.columns["caption_chars"][usable]
    field = next((column for column in ("licence", "license") if column in index.columns), None)
    licences = Counter(str(v) or "unknown" for v in index.columns[field][usable]) if field else Counter()
    return Source(
        name, len(shards), len(index), int(usable.sum()), int(video.sum()), int((usable & (frames <= 1)).sum()),
        float((frames[video] / fps[video]).sum() / 3600), int(sides.min(initial=0)) if len(sides) else 0,
        int(sides.max(initial=0)), float(captions.mean()) if len(captions) else 0.0,
        dict(Counter(index.columns["refused"][~usable].tolist())), dict(licences),
    )  # fmt: skip


def seen(run: Path) -> dict[str, Any]:
    """Count visits, distinct samples and steps in a run's ledger, and refusals by cause in its quarantine.jsonl.

    Raises InputError if the run has no ledger.
    """
    files = sorted((run / "ledger").glob("rank-*.jsonl"))
    if not files:
        raise InputError(f"{run / 'ledger'} holds no record of what was trained on; cards need it")
    visits, samples, steps = 0, set[int](), 0
    for file in files:
        for entry in entries(file):
            visits += len(entry["samples"])
            samples |= set(entry["samples"])
            steps = max(steps, entry["step"])
    causes = Counter(str(line.get("cause")) for line in entries(run / "quarantine.jsonl"))
    return {"visits": visits, "samples": len(samples), "steps": steps, "refused": dict(causes)}


def _model(run_dir: str, config: Config) -> dict[str, Any]:
    checkpoint = checkpoint_of(run_dir, None)
    shapes: Mapping[str, Sequence[int]] = read_state(checkpoint)["shapes"]
    last: dict[str, Any] = {}
    for entry in entries(Path(run_dir) / "metrics.jsonl"):
        last |= entry
    if "tokens" not in last:
        raise InputError(f"{Path(run_dir) / 'metrics.jsonl'} lacks tokens; cards need what was trained")
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    return {
        "family": config.model.family, "method": config.method, "parameters": sum(map(math.prod, shapes.values())),
        "checkpoint": checkpoint.name, "sha256": manifest["sha256"], "tokens": last["tokens"],
        "samples": last["samples"], "frames": config.data.max_frames, "pixels": config.data.max_pixels,
        "fps": config.data.made_fps, "tasks": {k: v for k, v in asdict(config)["flow"]["tasks"].items() if v},
        "init_from": config.model.init_from,
    }  # fmt: skip


def _evaluation(run: Path) -> dict[str, Any]:
    """Read the figures of samples and of real videos. Raises InputError if the run was not evaluated."""
    path = run / "evaluation.json"
    if not path.is_file():
        raise InputError(f"{path} is missing; python -m sora_train.evaluate run_dir={run}")
    found = json.loads(path.read_text(encoding="utf-8"))
    rows = {
        name: {column: cell(Estimate(**_numbers(value)), one["summary"]) for column, value in one["columns"].items()}
        for name, one in found["figures"].items()
        if SAMPLES in one["columns"]
    }
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    return {"rows": rows, "columns": columns, "videos": found["videos"], "checkpoint": found["checkpoint"]}


def _redteam(folder: str | None) -> dict[str, Any] | None:
    if folder is None:
        return None
    path = Path(folder) / REPORT
    if not path.is_file():
        raise InputError(f"redteam={folder} holds no {REPORT}")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _numbers(value: Mapping[str, Any]) -> dict[str, Any]:
    return {key: float(one) if isinstance(one, str) else one for key, one in value.items()}


def _required(facts: Any, name: str, shown: str, path: Path) -> None:
    value = facts.get(name) if isinstance(facts, dict) else None
    if value is None or (isinstance(value, str) and not value.strip()):
        raise InputError(f"{path} lacks {shown}; {_TEMPLATES / _EXAMPLE} says what belongs there")
