"""Traces of chosen steps."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from sora_train.training.profiling import StepProfile


def steps(profile: StepProfile, first: int, last: int) -> None:
    for step in range(first, last + 1):
        profile.before(step)
        torch.ones(4, 4) @ torch.ones(4, 4)
        profile.after(step)


def test_only_the_chosen_steps_are_traced(tmp_path: Path) -> None:
    profile = StepProfile(tmp_path, 3, [2, 4])
    steps(profile, 1, 1)
    assert not (tmp_path / "profile").exists()
    steps(profile, 2, 6)
    events = json.loads((tmp_path / "profile/rank-3-steps-2-4.json").read_text())["traceEvents"]
    assert sum(event.get("name") == "aten::mm" for event in events) == 3


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
