"""Red teaming: rates are recovered, an interruption loses nothing, the report holds no prompt."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from sora_train.core.cli import InputError
from sora_train.release.folder import ReleaseFolder
from sora_train.release.redteam import (
    BY_OUTPUT,
    BY_PROMPT,
    MADE,
    Case,
    attempt_all,
    compared,
    read_cases,
    report_of,
)

ABOUT = {"weights": "w"}


def cases(count: int) -> list[Case]:
    return [Case(str(n), "tea" if n % 2 else "cups", f"secret words {n}", n % 4 < 2) for n in range(count)]


def test_the_leak_rate_of_a_stub_is_within_its_interval(tmp_path: Path) -> None:
    """Every fifth that should be blocked leaks: 20%."""
    every = cases(400)
    bad = [case.id for case in every if case.blocked]
    leaking = set(bad[::5])

    def attempt(case: Case) -> str:
        if not case.blocked:
            return BY_PROMPT if case.id == every[2].id else MADE
        return MADE if case.id in leaking else BY_OUTPUT if int(case.id) % 3 else BY_PROMPT

    report = report_of(every, attempt_all(every, tmp_path / "out", ABOUT, attempt), ABOUT)
    leaked = report["all"]["leaked"]
    assert leaked["low"] <= 0.2 <= leaked["high"] and leaked["count"] == len(leaking)
    assert report["all"]["over_blocked"]["count"] == 1 and report["all"]["over_blocked"]["n"] == 200
    parts = [report["all"][name]["count"] for name in ("leaked", "blocked_before", "blocked_after")]
    assert sum(parts) == len(bad)
    text = json.dumps(report) + (tmp_path / "out" / "results.jsonl").read_text()
    assert "secret words" not in text
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o700


def test_an_interruption_loses_nothing(tmp_path: Path) -> None:
    every, tried = cases(10), []

    def stops(case: Case) -> str:
        if len(tried) == 4:
            raise KeyboardInterrupt
        tried.append(case.id)
        return MADE

    with pytest.raises(KeyboardInterrupt):
        attempt_all(every, tmp_path, ABOUT, stops)
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"id": "9", "outc')  # cut short by a kill
    again: list[str] = []
    attempt_all(every, tmp_path, ABOUT, lambda case: again.append(case.id) or MADE)
    assert again == [case.id for case in every if case.id not in tried]
    with pytest.raises(InputError, match="another model, guard or set"):
        attempt_all(every, tmp_path, {"weights": "other"}, lambda case: MADE)


def test_two_versions_are_compared_case_by_case(tmp_path: Path) -> None:
    every = cases(40)
    attempt_all(every, tmp_path / "a", ABOUT, lambda case: MADE)
    attempt_all(every, tmp_path / "b", ABOUT, lambda case: BY_PROMPT if case.blocked else MADE)
    console = Console(record=True, width=200)
    console.print(compared([tmp_path / "a", tmp_path / "b"]))
    row = next(line for line in console.export_text().splitlines() if " all " in line)
    assert [cell.strip() for cell in row.strip("│").split("│")] == ["all", "0", "20", "0.000"]


def test_a_set_as_other_systems_write_it_is_read(tmp_path: Path) -> None:
    row = {"id": "1", "category": "a", "prompt": "a cup\u2028and a pot", "expected": "block"}
    text = "\ufeff" + json.dumps(row, ensure_ascii=False) + "\r\n"
    (tmp_path / "set.jsonl").write_bytes(text.encode())
    assert [case.prompt for case in read_cases(tmp_path / "set.jsonl")] == [row["prompt"]]


@pytest.mark.parametrize(
    "line",
    ["{", "[]", '{"id": "1"}', '{"id": 1, "category": "a", "prompt": "b", "expected": "block"}',
     '{"id": "1", "category": "a", "prompt": "b", "expected": "maybe"}'],
)  # fmt: skip
def test_a_line_that_is_no_prompt_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "set.jsonl").write_text(line + "\n")
    with pytest.raises(InputError, match="line 1"):
        read_cases(tmp_path / "set.jsonl")


def test_the_command_takes_a_set_through_guard_and_model(
    folder: Path,
    release_folder: ReleaseFolder,
    release: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    (release_folder.path / "words.txt").write_text("tea: teapot\n")
    rows = [
        ("1", "tea", "a t.e.a.p.o.t", "block"),
        ("2", "tea", "a pot of tea", "block"),
        ("3", "cups", "a cup", "allow"),
    ]
    names = ("id", "category", "prompt", "expected")
    (folder / "set.jsonl").write_text("".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows))
    out = folder / "red"
    command = ["redteam", f"run_dir={folder}/run", f"prompts={folder}/set.jsonl", f"out={out}"]
    assert release(*command, f"release={release_folder.path}", "seconds=0.25") == 0
    report = json.loads((out / "report.json").read_text())
    assert report["all"]["blocked_before"]["count"] == 1 and report["all"]["leaked"]["count"] == 1
    assert report["all"]["over_blocked"]["count"] == 0
    assert sorted(path.name for path in (out / "outputs").glob("*.json")) == ["2.json", "3.json"]
    assert release(*command, f"release={release_folder.path}", "seconds=0.5") == 2
