"""One evaluation of several runs: smaller models first, figures with intervals, nothing compared that differs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sora_train import compare
from sora_train.core.cli import InputError
from sora_train.evaluation.by_size import read_sized, rows_of


def run(folder: Path, width: int, seconds: float, right: int, **changed: Any) -> str:
    """A run folder with a checkpoint and an evaluation of 20 prompts."""
    place = folder / "checkpoints/step-00000300"
    place.mkdir(parents=True)
    totals = {"productive_s": seconds}
    shapes = {"video/a": [width, 4], "video/b": [width]}
    (place / "state.json").write_text(json.dumps({"step": 300, "totals": totals, "ranks": 2, "shapes": shapes}))
    cell = {"value": right / 20, "low": 0.1, "high": 0.9, "n": 20}
    figures = {"binding": {"better": "up", "summary": "rate", "columns": {"samples": cell}}}
    read = {"checkpoint": "step-00000300", "seed": 0, "prompts": "p", "videos": 20, "figures": figures}
    (folder / "evaluation").mkdir()
    text = json.dumps(read | {"columns": {"samples": []}, "distances": {}} | changed)
    (folder / "evaluation/prompts.json").write_text(text)
    return str(folder)


def test_runs_stand_by_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    places = [run(tmp_path / "large", 200, 50.0, 18), run(tmp_path / "small", 100, 40.0, 5)]
    header, rows = rows_of(read_sized(places, "prompts"), [])
    assert header == ["run", "parameters", "steps", "seconds of training", "binding"]
    assert rows == [
        ["small", "500", "300", "80", "25.0% (10% to 90%, n=20)"],
        ["large", "1,000", "300", "100", "90.0% (10% to 90%, n=20)"],
    ]
    page = tmp_path / "page.html"
    monkeypatch.setattr("sys.argv", ["compare", *places, "evaluation=prompts", f"html={page}"])
    assert compare.main() == 0
    assert "25.0%" in capsys.readouterr().out and "<td>1,000</td>" in page.read_text()


def test_what_differs_or_is_not_there_is_said(tmp_path: Path) -> None:
    one = run(tmp_path / "one", 9, 1.0, 3)
    for name, changed, says in (
        ("other", {"seed": 1}, "the evaluations differ in seed"),
        ("gone", {"checkpoint": "step-00000200"}, "of checkpoint step-00000200, which is gone"),
    ):
        with pytest.raises(InputError, match=says):
            read_sized([one, run(tmp_path / name, 9, 1.0, 3, **changed)], "prompts")
    hashed = [run(tmp_path / path, 9, 1.0, 3, prompts=path, clips="sha") for path in ("here", "there")]
    assert len(read_sized(hashed, "prompts")) == 2, "one prompt file, given by two paths"
    with pytest.raises(InputError, match="has no evaluation"):
        read_sized([one], "clips")
    with pytest.raises(InputError, match="there is no .*/evaluation/others.json; give"):
        read_sized([one], "others")
    with pytest.raises(InputError, match="has no checkpoint"):
        read_sized([str(tmp_path)], "prompts")
    with pytest.raises(InputError, match="no run has bindign; did you mean 'binding'"):
        rows_of(read_sized([one], "prompts"), ["bindign"])
