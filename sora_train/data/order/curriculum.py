"""Stages of training: successive plans over the same samples with other sizes, lengths or shares of the sources.

A stage starts with a new epoch, and epochs are numbered through all stages, so a position is the same three integers
and no two steps of a run share one. The stage of a step follows from the number of steps before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from hashlib import sha256

import numpy as np

from sora_train.config.schema import DataConfig, StageConfig, clip_rate
from sora_train.core.cli import InputError
from sora_train.data.index.index import Index
from sora_train.data.order.plan import Amendment, Plan, PlanInputs, Position, Slots
from sora_train.data.order.selection import Selection
from sora_train.data.order.shared_windows import SharedWindows


class Stages:
    """The plans of all stages of a run. Stage n ends at step `ends[n]`; the last one has no end."""

    def __init__(self, plans: Sequence[Plan], ends: Sequence[int]) -> None:
        self.plans, self.ends = plans, ends
        self.index, self.inputs, self.filtered = plans[0].index, plans[0].inputs, plans[0].filtered
        self.hash = plans[0].hash
        if len(plans) > 1:
            self.hash = sha256(repr(([plan.hash for plan in plans], list(ends))).encode()).hexdigest()

    def share(self, run: str, owner: bool) -> None:
        """Let the ranks of a node share what they plan; `run` is the same on all of them, and one owns the files."""
        for plan in self.plans:
            plan.shared = SharedWindows(f"{run}-{plan.hash[:16]}", owner)

    @property
    def amendments(self) -> list[Amendment]:
        """Samples that are left out, and the epoch from which on."""
        return self.plans[0].amendments

    def stage(self, taken: int) -> int:
        """Index of the stage of the step that follows the first `taken` steps."""
        return int(np.searchsorted(self.ends, taken, side="right"))

    def from_position(self, at: Position, taken: int = 0) -> Iterator[tuple[Position, Slots]]:
        """Steps from `at` on, for ever, each with its own position; `taken` steps were taken before."""
        while True:
            stage = self.stage(taken)
            if taken > 0 and self.stage(taken - 1) != stage:
                at = Position(at.epoch + 1, 0, 0)
            for position, slots in self.plans[stage].from_position(at):
                yield position, slots
                at, taken = position, taken + 1
                if self.stage(taken) != stage:
                    break

    def before(self, at: tuple[int, int, int], taken: int) -> str:
        """A hash of the shards that the epoch of the step at `at` visits in earlier windows."""
        return self.plans[self.stage(taken)].before(Position(*at))

    def amend(self, at: Position, taken: int, ahead: int, samples: Sequence[int]) -> None:
        """Leave samples out from the first epoch that begins more than `ahead` steps after the step at `at`.

        `at` follows `taken` steps. Steps that were already handed to the loader stay unchanged. A pure function of its
        arguments, the inputs and the earlier amendments.
        """
        stage = self.stage(taken)
        while stage < len(self.ends) and (last := self.ends[stage] - 1 - taken) < ahead:
            at = Position(self.plans[stage].epoch_after(at, last) + 1, 0, 0)
            taken, ahead, stage = taken + last + 1, ahead - last - 1, stage + 1
        epoch = self.plans[stage].epoch_after(at, ahead) + 1
        self.restore([*self.amendments, Amendment(epoch, tuple(samples))])

    def restore(self, amendments: Sequence[Sequence[int | Sequence[int]]]) -> None:
        """Replace the amendments by those of a checkpoint."""
        for plan in self.plans:
            plan.restore(amendments)


def build_stages(index: Index, source_of: Sequence[str], data: DataConfig, inputs: PlanInputs) -> Stages:
    """Build the plan of a configuration.

    `source_of` is the source of each shard, `inputs` the part that all stages share. Raises InputError if a source with
    a weight has no sample.
    """
    stages = data.stages or [StageConfig()]
    weights = {name: source.weight for name, source in data.sources.items() if source.weight is not None}
    repeats = {name: source.repeat for name, source in data.sources.items()}
    mixed = bool(weights) or any(stage.weights for stage in stages)
    visits = Selection(index, inputs.filters, inputs.weight).visits() if mixed else np.zeros(0, dtype=np.int64)
    plans = []
    for stage in stages:
        rate = _rates(source_of, visits, stage.weights or weights) if stage.weights or weights else repeats
        changed = {name: getattr(stage, name) for name in ("fps", "max_frames", "max_pixels")}
        changed = {name: value for name, value in changed.items() if value is not None}
        if stage.fps is not None:
            changed["fps"] = clip_rate(stage.fps)
        if stage.tasks:
            changed["tasks"] = tuple(sorted((task, weight) for task, weight in stage.tasks.items() if weight > 0))
        plans.append(Plan(index, replace(inputs, repeats=tuple(rate[name] for name in source_of), **changed)))
    return Stages(plans, [stage.until_step for stage in stages[:-1] if stage.until_step is not None])


def _rates(source_of: Sequence[str], visits: np.ndarray, weights: dict[str, float]) -> dict[str, float]:
    """Rate of each source, so that its share of an epoch's visits is its weight's.

    An epoch has as many visits as the sources whose weight is above 0 have at a rate of 1 (`visits`, of each shard).
    """
    names = np.asarray(source_of, dtype=object)
    own = {name: visits[names == name].sum().item() for name in sorted(set(source_of))}
    empty = [name for name, weight in weights.items() if weight > 0 and not own.get(name)]
    if empty:
        raise InputError(f"data.sources.{empty[0]} has a weight and no usable sample; look at its filter and index")
    total = sum(count for name, count in own.items() if weights.get(name, 0) > 0)
    share = {name: weights.get(name, 0) / sum(weights.values()) for name in own}
    return {name: share[name] * total / (count or 1) for name, count in own.items()}
