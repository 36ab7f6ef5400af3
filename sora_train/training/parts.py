"""Interfaces and records that the training loop works with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from sora_train.core.batch import Pack, Refusal
from sora_train.methods.base import Learner
from sora_train.training.engine.engines import Engines
from sora_train.training.health.guard import Guard
from sora_train.training.health.watch import Watch
from sora_train.training.report.console import Console
from sora_train.training.report.meter import Meter
from sora_train.training.report.writers import Writers
from sora_train.training.state.ledger import Ledger
from sora_train.training.state.mirror import Mirror


class Step(Protocol):
    """A step of the loader: this rank's packs for one optimizer step."""

    position: Any
    packs: list[Pack]

    @property
    def samples(self) -> list[int]:
        """Index rows of the clips in the packs."""

    @property
    def refused(self) -> list[Refusal]:
        """Samples that could not be used."""


class Plan(Protocol):
    """The order of the data, see `data.order.plan`."""

    hash: str

    @property
    def amendments(self) -> Sequence[Any]:
        """Amendments: lists of samples to leave out, each with the first epoch to which it applies."""

    def before(self, at: Any, taken: int) -> str:
        """Hash of the shards in the earlier windows of an epoch.

        Args:
            at: Position of a step (epoch, window, step); the windows before it in its epoch are hashed.
            taken: Number of steps before it, which selects the stage of a curriculum.
        """

    def amend(self, at: Any, taken: int, ahead: int, samples: Sequence[int]) -> None:
        """Leave samples out of epochs that begin more than `ahead` steps (which may be prefetched) after `at`."""

    def restore(self, amendments: Sequence[Any]) -> None:
        """Set the amendments from a checkpoint."""


class Noted(Sequence[Pack]):
    """A sequence of packs that calls `note` with each pack when it is accessed."""

    def __init__(self, packs: Sequence[Pack], note: Callable[[Pack], None]) -> None:
        self._packs, self._note = packs, note

    def __len__(self) -> int:
        return len(self._packs)

    def __getitem__(self, place: Any) -> Any:
        pack = self._packs[place]
        self._note(pack)
        return pack


@dataclass(frozen=True)
class Marks:
    """Metrics of an evaluation by name, and the score that compares checkpoints, signed so that higher is better."""

    figures: dict[str, float]
    score: float | None


@dataclass
class Parts:
    """Everything that the trainer works with; built by `operations.build`."""

    learner: Learner
    engines: Engines
    meter: Meter
    open_writers: Callable[[int], Writers | None]  # takes the step to resume from; returns None except on the main rank
    console: Console
    plan: Plan
    # takes the number of planned steps so far, the position, and known refusals; yields `Step`s
    steps_from: Callable[[int, tuple[int, ...], dict[Any, Refusal]], Iterator[Any]]
    validation: Callable[[], Iterator[Pack]]  # this rank's share of the held-out packs
    sample: Callable[[int, Callable[[], bool]], dict[str, Path]]  # takes the step and a stop request; returns videos
    evaluate: Callable[[Callable[[], bool]], Marks]  # takes a stop request
    ledger: Ledger
    mirror: Mirror | None  # on the main rank, if configured
    guard: Guard  # handles signals once it is created; earlier ones end the process, as there is nothing to save
    watch: Watch


@dataclass(frozen=True)
class Place:
    """Step, phase and pack in which a run failed or another event occurred."""

    step: int  # number of steps done
    phase: str
    pack: str = ""  # description of the pack, in phases that compute on one

    def __str__(self) -> str:
        return f"in phase {self.phase!r} after step {self.step}" + (f", on {self.pack}" if self.pack else "")
