"""The parts of a run, as the training loop sees them: a learner, steps of packs, engines, and places to report to."""

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


class Noted(Sequence[Pack]):
    """Packs; whoever goes through them has each one noted as the pack that is computed on."""

    def __init__(self, packs: Sequence[Pack], note: Callable[[Pack], None]) -> None:
        self._packs, self._note = packs, note

    def __len__(self) -> int:
        return len(self._packs)

    def __getitem__(self, place: Any) -> Any:
        pack = self._packs[place]
        self._note(pack)
        return pack


@dataclass
class Parts:
    """What the trainer is given."""

    learner: Learner
    engines: Engines
    meter: Meter
    open_writers: Callable[[int], Writers | None]  # by the step that the run goes on from; None off the main rank
    console: Console
    plan: Plan
    # steps taken of the plan, position, refusals known from before
    steps_from: Callable[[int, tuple[int, ...], dict[Any, Refusal]], Iterator[Any]]
    validation: Callable[[], Iterator[Pack]]  # this rank's share of the held-out packs
    sample: Callable[[int, Callable[[], bool]], dict[str, Path]]  # step, whether to break off: videos
    ledger: Ledger
    mirror: Mirror | None  # the main rank's, if any
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
