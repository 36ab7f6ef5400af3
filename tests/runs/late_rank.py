"""Runs of two ranks, one of which computes 30% slower in one step of ten; a kind of `worker.py`.

A step's computation is a pause of known length, so that the machine's other work doesn't count. Both ranks note when
they begin a step and when they are about to send gradients, on the clock that they have in common.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from sora_train.config.schema import Config
from sora_train.core.batch import Pack
from sora_train.methods.base import Engines, OneNetwork, StepResult
from sora_train.methods.diffusion.learner import DiffusionLearner
from tests.faults.bed import Bed, Job

PAUSE_S, SLOWER, EVERY, STEPS = 0.15, 0.3, 10, 60


def late_rank(bed: Bed) -> object:
    """What a slow step costs the other rank, with packs of its own and with packs that both share."""
    ways = {"own packs": ("data.slots=2",), "shared packs": ("data.slots=1", "parallel.sequence=2")}  # a pass a step
    configs = {
        name: bed.config(name.replace(" ", "-"), *keys, f"steps={STEPS}", "checkpoint.every_steps=100")
        for name, keys in ways.items()
    }
    first, *then = configs.values()
    job = Job(first, 2, _slow, then=then)
    if code := job.wait():
        raise RuntimeError(f"ended with {code}:\n{job.log.read_text()[-4000:]}")
    return {name: costs(*(_noted(config, rank) for rank in (0, 1))) for name, config in configs.items()}


def costs(mine: Sequence[Sequence[float]], late: Sequence[Sequence[float]]) -> dict[str, float]:
    """What slow steps cost the rank that waits, from when each rank began each step and was ready to send gradients.

    Returns:
        Medians over the slow steps, in seconds: by how much the other came later (`late`), and how much later this rank
        began its next step than after other steps, from its own readiness on (`lost`). Then how much later it began the
        one after next (`after`), which should be nothing.
    """
    begun, ready = zip(*mine, strict=True)
    theirs = [when for _, when in late]
    usual = median(begun[n + 1] - max(ready[n], theirs[n]) for n in range(2, len(begun) - 1))  # from both ready on
    slow = range(EVERY - 1, len(begun) - 2, EVERY)
    lost = [begun[n + 1] - ready[n] - usual for n in slow]
    after = [begun[n + 2] - max(ready[n + 1], theirs[n + 1]) - usual for n in slow]
    return {"late": median(theirs[n] - ready[n] for n in slow), "lost": median(lost), "after": median(after)}


def _noted(config: Config, rank: int) -> list[list[float]]:
    return list(json.loads((Path(config.run_dir) / f"times-{rank}.json").read_text()))


def _slow(config: Config, rank: int) -> None:
    true_step = getattr(OneNetwork.step, "true", OneNetwork.step)  # one process makes several runs
    true_loss = getattr(DiffusionLearner.loss, "true", DiffusionLearner.loss)
    times: list[list[float]] = []

    def step(self: OneNetwork, engines: Engines, packs: Sequence[Pack]) -> StepResult:
        times.append([time.monotonic()])
        result = true_step(self, engines, packs)
        if len(times) == STEPS:
            (Path(config.run_dir) / f"times-{rank}.json").write_text(json.dumps(times))
        return result

    def loss(self: DiffusionLearner, network: Any, pack: Pack) -> Any:
        found = true_loss(self, network, pack)
        slow = rank == 1 and len(times) % EVERY == 0
        time.sleep(PAUSE_S * (1 + SLOWER * slow))
        times[-1].append(time.monotonic())
        return found

    step.true, loss.true = true_step, true_loss  # type: ignore[attr-defined]
    OneNetwork.step, DiffusionLearner.loss = step, loss  # type: ignore[method-assign]
