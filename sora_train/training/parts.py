"""What the training loop is given, as it sees it: a task, steps of packs, an engine, and places to report to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from sora_train.core.batch import Pack, Refusal
from sora_train.training.engine.zero import Engine
from sora_train.training.health.guard import Guard
from sora_train.training.health.watch import Watch
from sora_train.training.report.console import Console
from sora_train.training.report.meter import Meter
from sora_train.training.report.writers import Writers


class Task(Protocol):
    """What a step does with a pack."""

    def weight(self, pack: Pack) -> float:
        """Loss-bearing units of a pack."""

    def loss(self, network: Any, pack: Pack, device: torch.device) -> Any:
        """An object with `sum`, and `level_sum`, `level_weight`, `texts`, `by_task` (or None)."""


class Step(Protocol):
    """What the loader yields."""

    position: Any
    packs: list[Pack]

    @property
    def samples(self) -> list[int]:
        """Rows of the clips that arrived."""

    @property
    def refused(self) -> list[Refusal]:
        """Samples that did not."""


class Plan(Protocol):
    """Which samples come when."""

    hash: str

    @property
    def amendments(self) -> Sequence[Any]:
        """What is left out, and from when on."""

    def amend(self, at: Any, taken: int, ahead: int, samples: Sequence[int]) -> None:
        """Leave samples out of later epochs."""

    def restore(self, amendments: Sequence[Any]) -> None:
        """Take over what a checkpoint kept."""


@dataclass
class Parts:
    """What the trainer is given."""

    task: Task
    engine: Engine
    meter: Meter
    open_writers: Callable[[int], Writers | None]  # by the step that the run goes on from; None off the main rank
    console: Console
    plan: Plan
    # steps taken of the plan, position, refusals known from before
    steps_from: Callable[[int, tuple[int, ...], dict[Any, Refusal]], Iterator[Any]]
    validation: Callable[[], Iterator[Pack]]  # this rank's share of the held-out packs
    sample: Callable[[Any, int, Callable[[], bool]], dict[str, Path]]  # network, step, whether to break off: videos
    guard: Guard  # listens from now on; before, a signal ends the process at once, as nothing is to be saved
    watch: Watch


@dataclass(frozen=True)
class Agreement:
    """What all ranks know of a step: loss-bearing weight, samples, refusals, tokens."""

    weight: float
    arrived: int
    refused: int
    tokens: int


@dataclass(frozen=True)
class Place:
    """Where in a run something happened."""

    step: int  # steps done
    phase: str
    pack: str = ""  # what was computed on, where the phase computes on a pack

    def __str__(self) -> str:
        return f"in phase {self.phase!r} after step {self.step}" + (f", on {self.pack}" if self.pack else "")
