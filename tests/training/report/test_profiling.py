"""Traces of chosen steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sora_train.training.report.profiling import StepProfile, dump_memory, record_memory


def steps(profile: StepProfile, first: int, last: int) -> None:
    for step in range(first, last + 1):
        profile.before(step)
        profile.phase("product")
        torch.ones(4, 4) @ torch.ones(4, 4)
        profile.after(step)


def test_only_the_chosen_steps_are_traced(tmp_path: Path) -> None:
    profile = StepProfile(tmp_path, 3, [2, 4])
    steps(profile, 1, 1)
    assert not (tmp_path / "profile").exists()
    steps(profile, 2, 6)
    events = json.loads((tmp_path / "profile/rank-3-steps-2-4.json").read_text())["traceEvents"]
    for name in ("aten::mm", "product"):
        assert sum(event.get("name") == name for event in events) == 3


def test_a_run_that_ends_early_leaves_what_it_has(tmp_path: Path) -> None:
    profile = StepProfile(tmp_path, 0, [2, 9])
    steps(profile, 1, 3)
    profile.close()
    profile.close()
    assert "aten::mm" in (tmp_path / "profile/rank-0-steps-2-9.json").read_text()


def test_none_is_traced_unless_asked(tmp_path: Path) -> None:
    profile = StepProfile(tmp_path, 0, [])
    steps(profile, 1, 3)
    profile.close()
    assert not list(tmp_path.iterdir())


def test_memory_is_recorded_only_where_there_is_a_gpu(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[dict[str, object]] = []
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **options: asked.append(options))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    record_memory()
    assert not asked and "does nothing here" in caplog.text
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    record_memory()
    assert asked == [{"max_entries": 100_000, "stacks": "python"}]


def test_a_snapshot_that_fails_hides_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: Path(path).write_text("blocks"))
    assert dump_memory(tmp_path / "logs" / "a.pickle") == str(tmp_path / "logs" / "a.pickle")

    def full(path: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", full)
    assert dump_memory(tmp_path / "logs" / "b.pickle") == "" and "No space left" in caplog.text
