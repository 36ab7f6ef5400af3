"""Every figure is documented with its unit, the dashboard asks for none that isn't there, Prometheus gets them all."""

from __future__ import annotations

import ast
import json
import re
import urllib.request
from pathlib import Path

import pytest

from sora_train.config.schema import WRITERS
from sora_train.training.report.writers import KNOWN, Writers

ROOT = Path(__file__).parents[1]
DOCUMENTED = dict(re.findall(r"^\| `([\w/]+)` \| ([^|]+) \|", (ROOT / "docs/metrics.md").read_text(), flags=re.M))


def logged() -> set[str]:
    """The figures that the code makes: keys of the dictionaries in the places where figures come from."""
    found: set[str] = set()
    for path, functions in {
        "sora_train/training/report/meter.py": {"read"},
        "sora_train/training/trainer.py": {"report", "validate", "evaluate"},
        "sora_train/training/engine/engines.py": {"figures"},
        "sora_train/training/report/prometheus.py": {"scalars", "_checkpoint_age"},
        "sora_train/training/health/watch.py": {"stragglers"},
    }.items():
        for node in ast.walk(ast.parse((ROOT / path).read_text())):
            if not isinstance(node, ast.FunctionDef) or node.name not in functions:
                continue
            for part in ast.walk(node):
                keys = part.keys if isinstance(part, ast.Dict) else [part.key] if isinstance(part, ast.DictComp) else []
                if isinstance(part, ast.Subscript) and isinstance(part.ctx, ast.Store):
                    keys = [part.slice]
                for key in keys:
                    if isinstance(key, ast.Constant) and isinstance(key.value, str):
                        found.add(key.value)
                    elif isinstance(key, ast.JoinedStr) and isinstance(key.values[0], ast.Constant):
                        found.add(f"{key.values[0].value}B")  # a bin
    return found


def test_code_and_documentation_name_the_same_figures() -> None:
    assert logged() == set(DOCUMENTED)
    assert len(DOCUMENTED) >= 20 and all(unit.strip() for unit in DOCUMENTED.values())


def test_the_configuration_knows_the_writers() -> None:
    assert {"jsonl", *WRITERS} == set(KNOWN)


def test_the_dashboard_shows_only_figures_that_exist() -> None:
    board = json.loads((ROOT / "launch/grafana/sora_train.json").read_text())
    asked = {name for p in board["panels"] for t in p["targets"] for name in re.findall(r"sora_train_(\w+)", t["expr"])}
    assert asked <= {name.partition("/")[0] for name in DOCUMENTED}
    shown = ("tokens_per_s", "mfu", "data_wait", "goodput", "skipped_samples", "checkpoint_age", "slowest_rank_lag")
    assert set(shown) <= asked
    assert len({p["id"] for p in board["panels"]}) == len(board["panels"])
    assert all({"type", "title", "gridPos", "datasource"} <= set(p) for p in board["panels"])


def test_the_dashboard_asks_for_what_the_exporter_emits(tmp_path: Path) -> None:
    """Each panel's metric, what it selects by and what its legend shows, against the text that Prometheus reads."""
    parser = pytest.importorskip("prometheus_client.parser")
    checkpoint(tmp_path / "run")
    writers = Writers(tmp_path / "run", "id", {}, ["prometheus"], 10, "p", resume_step=0)
    writers.scalars(7, {name.replace("/B", "/0.7"): 1.0 for name in logged() - {"checkpoint_age"}})
    writers.close()
    emitted: dict[str, set[str]] = {}
    for family in parser.text_string_to_metric_families((tmp_path / "run/metrics.prom").read_text()):
        for sample in family.samples:
            assert sample.labels["run"] == "run"
            emitted.setdefault(sample.name, set()).update(sample.labels)
    assert len(emitted) == len(logged())

    board = json.loads((ROOT / "launch/grafana/sora_train.json").read_text())
    (run,) = [v for v in board["templating"]["list"] if v["name"] == "run"]
    metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", run["query"]).groups()  # type: ignore[union-attr]
    assert label in emitted[metric]
    places = set()
    for panel in board["panels"]:
        places.add((panel["gridPos"]["x"], panel["gridPos"]["y"]))
        for target in panel["targets"]:
            asked = re.fullmatch(r'(\w+)\{(\w+)=~"\$run"\}', target["expr"])
            assert asked and asked[2] in emitted[asked[1]], target["expr"]
            assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= emitted[asked[1]]
    assert len(places) == len(board["panels"])


FIGURES = {"loss": 0.5, "loss_by_noise/0.7": 0.25, "mfu": 0.3, "grad_norm": float("nan")}


def checkpoint(run_dir: Path) -> None:
    folder = run_dir / "checkpoints" / "step-00000001"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")


def test_prometheus_gets_a_file(tmp_path: Path) -> None:
    pytest.importorskip("prometheus_client")
    checkpoint(tmp_path / "run")
    writers = Writers(tmp_path / "run", "id", {}, ["prometheus"], 10, "p", resume_step=0)
    writers.scalars(7, FIGURES)
    writers.scalars(8, {"validation_loss": 1.5})
    writers.close()
    text = (tmp_path / "run" / "metrics.prom").read_text()
    for line in (
        'sora_train_loss{run="run"} 0.5', 'sora_train_loss_by_noise{bin="0.7",run="run"} 0.25',
        'sora_train_step{run="run"} 8.0', 'sora_train_validation_loss{run="run"} 1.5',
        'sora_train_grad_norm{run="run"} NaN',
    ):  # fmt: skip
        assert line in text.splitlines(), text
    age = re.search(r'sora_train_checkpoint_age\{run="run"\} ([\d.e+-]+)', text)
    assert age and 0 <= float(age[1]) < 60


def test_prometheus_reads_a_port(tmp_path: Path) -> None:
    pytest.importorskip("prometheus_client")
    import socket

    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    writers = Writers(tmp_path / "run", "id", {}, ["prometheus"], 10, "p", resume_step=0, prometheus_port=port)
    writers.scalars(7, FIGURES)
    text = urllib.request.urlopen(f"http://localhost:{port}/metrics", timeout=120).read().decode()
    assert 'sora_train_mfu{run="run"} 0.3' in text and "checkpoint_age" not in text
    writers.close()
    with pytest.raises(OSError):
        urllib.request.urlopen(f"http://localhost:{port}/metrics", timeout=2)
