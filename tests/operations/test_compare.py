"""Run folders read back: differences, curves, events, the table, the page and the picture."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from sora_train import compare
from sora_train.core.cli import InputError
from sora_train.core.media import write_mp4
from sora_train.operations.records import differences, events, flat, read, samples, thinned
from sora_train.operations.report import runs_page, write_report
from sora_train.operations.side_by_side import plot


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Two finished runs that differ in one key, and one that was killed."""
    folders = []
    for number, lr in enumerate((1e-3, 3e-3, 3e-3)):
        folder = tmp_path / f"run-{number}"
        (folder / "samples" / "step-000010").mkdir(parents=True)
        (folder / "logs").mkdir()
        (folder / "config.yaml").write_text(
            f"run_dir: {folder}\nseed: 0\noptim: {{lr: {lr}, betas: [0.9, 0.99]}}\ndata: {{sources: {{}}}}\n"
        )
        lines = [{"step": s, "loss": 1.0 / s + number, "mfu": 0.3} for s in (1, 5, 10)]
        lines[1]["grad_norm"] = "nan"  # type: ignore[assignment]
        text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 11, "lo'
        (folder / "metrics.jsonl").write_text(text)
        (folder / "logs" / "rank-0.log").write_text(
            "2026-01-02 03:04:05,678 INFO sora_train.run.x: resumed step-00000005, saved on 2 rank(s)\n"
            "2026-01-02 03:04:06,678 INFO sora_train.run.x: step 6/10 loss 0.5\n"
            "2026-01-02 03:04:07,678 WARNING sora_train.metrics: wandb <failed>\n"
        )
        causes = ("truncated", "truncated", "crash")
        text = "".join(json.dumps({"step": 1, "cause": cause}) + "\n" for cause in causes)
        (folder / "quarantine.jsonl").write_text(text)
        if number < 2:
            (folder / "exit.json").write_text('{"code": 0, "reason": "done"}')
        about = folder / "samples" / "step-000010" / "00"
        write_mp4(about.with_suffix(".mp4"), np.zeros((3, 32, 32, 3), np.uint8), 4.0)
        about.with_suffix(".json").write_text('{"prompt": "a <red> circle"}')
        folders.append(folder)
    return folders


def test_a_run_is_read_back(runs: list[Path]) -> None:
    record = read(runs[0])
    assert record.curves["loss"] == [(1, 1.0), (5, 0.2), (10, 0.1)]
    assert np.isnan(record.curves["grad_norm"][0][1]) and record.last("mfu") == 0.3 and record.last("none") is None
    assert record.quarantine == {"truncated": 2, "crash": 1} and record.end["reason"] == "done"
    assert flat({"a": {"b": 1, "c": {}}, "d": [1]}) == {"a.b": 1, "a.c": {}, "d": [1]}
    with pytest.raises(InputError, match="holds no run"):
        read(runs[0] / "samples")


def test_only_what_differs_is_shown(runs: list[Path]) -> None:
    records = [read(run) for run in runs]
    assert differences(records) == {"optim.lr": [0.001, 0.003, 0.003]}
    assert differences(records[1:]) == {}


def test_events_and_samples(runs: list[Path]) -> None:
    assert events(runs[0]) == [
        ("2026-01-02 03:04:05", "resumed step-00000005, saved on 2 rank(s)"),
        ("2026-01-02 03:04:07", "wandb <failed>"),
    ]
    ((step, clips),) = samples(runs[0]).items()
    assert step == 10 and clips == [("a <red> circle", runs[0] / "samples/step-000010/00.mp4")]


def test_a_report_needs_nothing_else(runs: list[Path]) -> None:
    text = write_report(read(runs[0])).read_text()
    assert set(re.findall(r'(?:src|href)="?([^"]{5})', text)) == {"data:"}
    assert "data:video/mp4;base64," in text and "a &lt;red&gt; circle" in text and "wandb &lt;failed&gt;" in text
    assert text.count("<polyline") == 2  # loss and mfu; one point is no curve
    assert "<td>optim.lr</td><td>0.001</td>" in text and "<td>truncated</td><td>2</td>" in text


def test_a_page_of_several_runs_tells_them_apart(runs: list[Path]) -> None:
    text = runs_page("both", [read(runs[0]), read(runs[1])])
    assert text.count("<polyline") == 4 and "<td>optim.lr</td><td>0.001</td><td>0.003</td>" in text


def test_the_command(runs: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = runs[0].parent
    arguments = [*map(str, runs), f"html={out / 'c.html'}"]
    monkeypatch.setattr("sys.argv", ["compare", *arguments])
    assert compare.main() == 0
    printed = capsys.readouterr().out
    assert "optim.lr" in printed and "0.003" in printed and "2.1" in printed and "killed" in printed
    assert (out / "c.html").read_text().count("<polyline") == 6
    monkeypatch.setattr("sys.argv", ["compare"])
    with pytest.raises(InputError, match="at least one run folder"):
        compare.main()
    monkeypatch.setattr("sys.argv", ["compare", str(runs[0]), "pgn=x"])
    with pytest.raises(InputError, match="did you mean 'png'"):
        compare.main()


def test_the_picture_is_drawn(runs: list[Path]) -> None:
    pytest.importorskip("matplotlib")
    path = runs[0].parent / "c.png"
    plot([read(run) for run in runs], ["loss", "mfu"], path)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 5000
    with pytest.raises(InputError, match="no run has a curve of nothing"):
        plot([read(runs[0])], ["nothing"], path)


def test_a_long_curve_keeps_its_ends_and_its_extremes() -> None:
    steps, values = np.arange(1, 100_001), np.sin(np.arange(100_000) / 3000)
    values[[50_000, 70_000]], values[60_000], values[-1], values[:300] = 9.0, -7.0, np.nan, np.inf
    curve = thinned(steps, values)
    assert 800 < len(curve) <= 1002 and [step for step, _ in curve] == sorted({step for step, _ in curve})
    assert {(50_001, 9.0), (60_001, -7.0), (70_001, 9.0)} <= set(curve)
    assert curve[0] == (1, np.inf) and curve[-1][0] == 100_000 and np.isnan(curve[-1][1])
    assert all(value == values[step - 1] for step, value in curve[:-1])
    assert thinned(steps[:900], values[:900]) == list(zip(range(1, 901), values[:900].tolist(), strict=True))


def test_the_page_of_a_long_run_is_small(runs: list[Path]) -> None:
    lines = (json.dumps({"step": s} | {f"figure_{n}": s * n for n in range(12)}) for s in range(1, 20_001))
    (runs[0] / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    warning = "2026-01-02 03:04:07,678 WARNING sora_train.metrics: number {}\n"
    (runs[0] / "logs/rank-0.log").write_text("".join(map(warning.format, range(5000))))
    told = events(runs[0])
    assert told[0][1] == "number 0" and told[-1][1] == "number 4999" and len(told) == 201
    assert told[100] == ("", "4800 more, in logs/rank-0.log")
    record = read(runs[0])
    assert record.last("figure_11") == 220_000.0
    assert write_report(record).stat().st_size < 400_000
