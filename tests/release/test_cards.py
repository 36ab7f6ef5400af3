"""Cards: their figures are those of index, ledger, evaluation and red team, and a missing field is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from sora_train.config.load import load, to_yaml
from sora_train.config.schema import SourceConfig
from sora_train.data.index.index import load_index
from sora_train.release import cards as cards_module

Give = Callable[..., int]
EXAMPLE = Path(cards_module.__file__).with_name("templates") / "facts.example.yaml"


@pytest.fixture
def run(folder: Path, corpus: list[str]) -> Path:
    """A run on the corpus with everything that cards are made from."""
    run = folder / "run"
    config = load(run)
    config.data.sources = {"blocks": SourceConfig(shards=corpus[:2]), "more": SourceConfig(shards=corpus[2:])}
    (run / "config.yaml").write_text(to_yaml(config))
    (run / "ledger").mkdir()
    lines = [{"step": step, "position": [0], "samples": [step, step + 1], "refused": []} for step in range(1, 6)]
    (run / "ledger" / "rank-0.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "quarantine.jsonl").write_text('{"step": 0, "cause": "too long"}\n{"step": 2, "cause": "no video"}\n')
    (run / "metrics.jsonl").write_text('{"step": 5, "samples": 12345, "tokens": 6789012}\n')
    estimate = {"value": 0.5, "low": 0.25, "high": 0.75, "n": 16}
    figures = {"flicker": {"better": "down", "summary": "mean", "columns": {"samples": estimate}}}
    evaluation = {"videos": 16, "checkpoint": "step-00000002", "figures": figures}
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    return run


@pytest.fixture
def facts(tmp_path: Path) -> Path:
    """Facts for both sources."""
    its = yaml.safe_load(EXAMPLE.read_text())
    its["sources"] = {"blocks": its["sources"]["demo"], "more": its["sources"]["demo"] | {"licence": "MIT"}}
    path = tmp_path / "facts.yaml"
    path.write_text(yaml.safe_dump(its))
    return path


def test_figures_are_those_of_the_files(run: Path, facts: Path, release: Give, corpus: list[str]) -> None:
    out = run / "cards"
    assert release("cards", f"run_dir={run}", f"facts={facts}", f"out={out}") == 0
    model, data, content = ((out / name).read_text() for name in cards_module.CARDS)
    assert "| 0.5 (0.25 to 0.75, n=16) |" in model and "12,345 samples drawn, 6,789,012 tokens, 5 steps" in model
    assert "10 visits of 6 samples in 5 steps" in data and "too long: 1" in data
    for name, shards in {"blocks": corpus[:2], "more": corpus[2:]}.items():
        index = load_index(shards)
        c, usable = index.columns, index.usable
        video = usable & (c["frames"] > 1)
        section = data.partition(f"## {name}\n")[2].partition("## ")[0]
        assert f"| samples | {len(index)} in {len(shards)} shards, {usable.sum()} usable |" in section
        assert f"| videos, images | {video.sum()}, {(usable & ~video).sum()} |" in section
        hours = (c["frames"][video] / c["fps"][video]).sum() / 3600
        assert f"| hours of video | {hours:.2f} |" in section
    assert (
        "| MIT |" in content and "Samples that training refused: 2." in content and "{{" not in model + data + content
    )


def test_the_red_team_is_in_the_model_card(run: Path, facts: Path, release: Give, tmp_path: Path) -> None:
    rate = {"count": 3, "n": 10, "rate": 0.3, "low": 0.108, "high": 0.603}
    row = {"prompts": 10, "leaked": rate, "over_blocked": rate | {"n": 0}}
    (tmp_path / "red").mkdir()
    (tmp_path / "red" / "report.json").write_text(json.dumps({"about": {}, "all": row, "categories": {"tea": row}}))
    command = ["cards", f"run_dir={run}", f"facts={facts}", f"out={run}/cards"]
    assert release(*command, f"redteam={tmp_path}/red") == 0
    assert "| tea | 10 | 3 of 10 (11% to 60%) | - |" in (run / "cards" / "model_card.md").read_text()
    assert release(*command, f"redteam={tmp_path}/none") == 2


@pytest.mark.parametrize("field", ["licence", "opt_outs", "sources.more", "sources.blocks.people"])
def test_a_missing_fact_is_named(
    run: Path, facts: Path, release: Give, field: str, capsys: pytest.CaptureFixture[str]
) -> None:
    its = yaml.safe_load(facts.read_text())
    *parents, last = field.split(".")
    place = its
    for parent in parents:
        place = place[parent]
    del place[last]
    facts.write_text(yaml.safe_dump(its))
    assert release("cards", f"run_dir={run}", f"facts={facts}", f"out={run}/cards") == 2
    assert f"lacks {field}" in capsys.readouterr().err and not (run / "cards").exists()


@pytest.mark.parametrize("missing", ["evaluation.json", "metrics.jsonl", "ledger/rank-0.jsonl"])
def test_a_missing_record_is_named(
    run: Path, facts: Path, release: Give, missing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / missing).unlink()
    assert release("cards", f"run_dir={run}", f"facts={facts}", f"out={run}/cards") == 2
    assert missing.split("/")[0] in capsys.readouterr().err
