"""The ranks agree a step ahead: what is asked when, when a step is judged, and when a stop takes effect."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from omegaconf import DictConfig

from sora_train.config.load import build
from sora_train.core.batch import Pack, Refusal
from sora_train.core.cli import STOPPED, InputError
from sora_train.core.world import World
from sora_train.methods.base import StepResult
from sora_train.training.agreement import Numbers, Request
from sora_train.training.parts import Parts
from sora_train.training.state.ledger import Ledger
from sora_train.training.trainer import Trainer

_NEVER = ("logging.validate_every", "logging.sample_every", "logging.evaluate_every", "guard.hash_every")


@dataclass
class _Step:
    position: tuple[int, int, int]
    packs: list[Pack] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    samples: list[int] = field(default_factory=list)


@dataclass
class _Run:
    """A trainer whose every part but the loop is a stand-in, and what happened in order."""

    trainer: Trainer
    events: list[str]

    def of(self, kind: str) -> list[str]:
        return [event for event in self.events if event.startswith(kind)]


@pytest.fixture
def make(compose_tree: Callable[..., DictConfig], tmp_path: Path, process_group: torch.device) -> Callable[..., _Run]:
    def run(*overrides: str, losses: Callable[[int], float] = float, stop_in: int = 0) -> _Run:
        none = (
            "checkpoint.every_steps=1000",
            "logging.validate_every=0",
            "logging.sample_every=0",
            "guard.hash_every=0",
        )
        config = build(compose_tree("experiment=demo", *none, *overrides), need_vae=False)
        config.run_dir, events = str(tmp_path / "run"), []
        guard, engines, learner = MagicMock(wants_stop=False, received=None), MagicMock(), MagicMock()
        engines.powers.lengths, engines.powers.values, engines.ema.values, engines.fragments = {}, {}, {}, []

        def steps(*_: Any) -> Iterator[_Step]:
            for number in range(1, 100):
                events.append(f"fetched {number}")
                yield _Step((0, 0, number - 1))

        def compute(*_: Any) -> StepResult:
            number = trainer.step + 1
            events.append(f"computed {number}")
            engines.loss.read.return_value = losses(number)
            guard.wants_stop = guard.wants_stop or number == stop_in
            return StepResult(math.isfinite(losses(number)))

        learner.step = compute
        trainer = Trainer(
            config, World(), torch.device("cpu"),
            Parts(
                learner, engines, MagicMock(), lambda step: None, MagicMock(), MagicMock(), steps, lambda: iter(()),
                MagicMock(), MagicMock(), Ledger(tmp_path / "run", 0), None, guard, MagicMock(),
            ),
        )  # fmt: skip
        true = trainer.health.judge

        def judge(step: int, position: Any, loss: float, applied: bool) -> Any:
            events.append(f"judged {step}: {loss}")
            return true(step, position, loss, applied)

        trainer.health.judge = judge  # type: ignore[method-assign]
        trainer.save = lambda: events.append(f"saved {trainer.step}")  # type: ignore[method-assign]
        return _Run(trainer, events)

    return run


def test_sums_of_one_rank_are_its_numbers(process_group: torch.device) -> None:
    mine = Numbers(3.5, 2.0, 1.0, 640.0, 1.0, 0.25)
    assert Request(mine).read() == mine


def test_a_step_is_computed_when_the_next_is_there_and_judged_when_it_was_taken(make: Callable[..., _Run]) -> None:
    run = make("steps=3")
    assert run.trainer.loop() == 0
    assert run.events == [
        "fetched 1", "fetched 2", "computed 1", "fetched 3", "computed 2", "judged 1: 1.0", "computed 3",
        "judged 2: 2.0", "judged 3: 3.0", "saved 3",
    ]  # fmt: skip


def test_what_rests_on_a_step_waits_for_its_verdict(make: Callable[..., _Run]) -> None:
    run = make("steps=5", "checkpoint.every_steps=2")
    assert run.trainer.loop() == 0
    told = [event.split(":")[0] for event in run.events if event.startswith(("computed", "judged", "saved"))]
    assert told == [
        "computed 1", "computed 2", "judged 1", "judged 2", "saved 2", "computed 3", "computed 4", "judged 3",
        "judged 4", "saved 4", "computed 5", "judged 5", "saved 5",
    ]  # fmt: skip


def test_a_signal_in_a_step_is_heeded_at_the_end_of_the_next(make: Callable[..., _Run]) -> None:
    run = make("steps=9", stop_in=2)
    assert run.trainer.loop() == STOPPED
    assert run.of("computed")[-1] == "computed 3" and run.events[-2:] == ["judged 3: 3.0", "saved 3"]


def test_steps_that_are_not_finite_end_the_run_one_step_later(make: Callable[..., _Run]) -> None:
    run = make("steps=9", "guard.max_bad_steps=2", losses=lambda number: math.nan if number > 2 else 1.0)
    with pytest.raises(InputError, match="steps 3 to 4 were not finite, and there is no checkpoint"):
        run.trainer.loop()
    assert run.of("computed")[-1] == "computed 5" and run.of("judged")[-1] == "judged 4: nan"
