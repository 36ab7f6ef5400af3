"""The training loop: what happens in a step, in order. It knows a task, an iterator of packs and an engine, no more."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from sora_train.batch import Pack, Refusal
from sora_train.cli import STOPPED
from sora_train.config import Config
from sora_train.training.checkpoint import Checkpoints, load_into, pieces, read_state
from sora_train.training.console import Console
from sora_train.training.ema import Ema
from sora_train.training.guard import BadShare, Guard
from sora_train.training.ledger import Ledger
from sora_train.training.meter import Meter
from sora_train.training.metrics import Writers
from sora_train.training.optim import lr_factor
from sora_train.training.zero import Engine
from sora_train.world import World

_log = logging.getLogger(__name__)


class Task(Protocol):
    """What a step does with a pack."""

    def weight(self, pack: Pack) -> float:
        """Loss-bearing units of a pack."""

    def loss(self, network: Any, pack: Pack, device: torch.device) -> Any:
        """An object with `sum`, and `level_sum`, `level_weight`, `texts` (or None)."""


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


@dataclass
class Parts:
    """What the trainer is given."""

    task: Task
    engine: Engine
    meter: Meter
    open_writers: Callable[[int], Writers | None]  # by the step that the run goes on from; None off the main rank
    console: Console
    plan_hash: str
    steps_from: Callable[[tuple[int, ...], dict[Any, Refusal]], Iterator[Any]]  # position, refusals known from before
    validation: Callable[[], Iterator[Pack]]  # this rank's share of the held-out packs
    sample: Callable[[Any, int], dict[str, Path]]  # network, step to videos by caption (main rank)


class Trainer:
    """One run: resumes where its newest checkpoint stands, trains to the last step or to a signal."""

    def __init__(self, config: Config, world: World, device: torch.device, parts: Parts) -> None:
        self.config, self.world, self.device, self.parts = config, world, device, parts
        self.engine, self.meter, self.console = parts.engine, parts.meter, parts.console
        self.run_dir = Path(config.run_dir)
        self.ema = Ema(self.engine.fragments, config.optim.ema_decay)
        self.checkpoints = Checkpoints(self.run_dir / "checkpoints", config.checkpoint.keep)
        self.ledger = Ledger(self.run_dir, world.rank)
        self.guard, self.bad = Guard(), BadShare(config.data.max_bad_fraction)
        self.causes: dict[str, int] = {}
        self.step, self.applied, self.position = 0, 0, (0, 0, 0)
        self.resume()
        self.writers = parts.open_writers(self.step)

    def train(self) -> int:
        """Run to the end; returns the exit code."""
        steps = self.parts.steps_from(self.position, self.known)
        self.meter.start()
        while self.step < self.config.steps:
            with self.meter.waiting():
                batch = next(steps)
            if self.world.sequence_rank == 0:  # the others of the group have the same samples
                self.ledger.write(self.step + 1, batch.position, batch.samples, batch.refused)
            agreed = self.agree(batch)  # an all-reduce on the CPU
            for pack in batch.packs:
                loss = self.parts.task.loss(self.engine, pack, self.device)
                self.engine.backward(loss.sum, agreed.weight)
                self.meter.add(pack, loss, agreed.weight)
            applied = self.engine.step(lr_factor(self.step, self.config.steps, self.config.optim))
            if applied:
                self.ema.update()
            self.advance(batch, applied)
            self.meter.step_done(agreed.arrived, agreed.tokens, agreed.refused, applied)
            self.bad.add(agreed.arrived, agreed.refused, self.causes)
            self.report()
            if self.due(self.config.logging.validate_every):
                self.validate()
            if self.due(self.config.logging.sample_every):
                self.sample()
            if self.due(self.config.checkpoint.every_steps) or agreed.stop:
                self.save()
            if agreed.stop and self.step < self.config.steps:
                return self.leave(
                    STOPPED, f"stopped by {self.guard.received or 'a signal to another rank'} after saving"
                )
        return self.leave(0, "done")

    def due(self, every: int) -> bool:
        """Whether something that happens every N steps (and at the end) happens now; 0 is never."""
        return every > 0 and (self.step % every == 0 or self.step == self.config.steps)

    def agree(self, batch: Step) -> Agreement:
        """Sum over ranks what every rank must know before it goes on."""
        for refusal in batch.refused:
            self.causes[refusal.cause] = self.causes.get(refusal.cause, 0) + 1
        mine = [
            sum(self.parts.task.weight(pack) for pack in batch.packs),
            float(len(batch.samples)),
            float(len(batch.refused)),
            float(sum(self.meter.tokens(pack) for pack in batch.packs)),
            float(self.guard.wants_stop),
        ]
        total = torch.tensor(mine, dtype=torch.float64)
        dist.all_reduce(total)
        weight, arrived, refused, tokens, stop = total.tolist()
        arrived, refused, tokens = (int(count) // self.world.sequence for count in (arrived, refused, tokens))
        return Agreement(max(weight, 1.0), arrived, refused, tokens, stop > 0)

    def advance(self, batch: Step, applied: bool) -> None:
        """Count the step and stand behind it in the plan."""
        epoch, window, step = batch.position
        self.step, self.position = self.step + 1, (epoch, window, step + 1)
        self.applied += applied
        if not applied:
            self.console.say(f"step {self.step}: a gradient was not finite; nothing was changed")

    def report(self) -> None:
        """Read the meter when a step is logged."""
        if not (self.due(self.config.logging.every_steps) or self.step == 1):
            return
        figures = self.meter.read() | {"grad_norm": self.engine.grad_norm, "lr": self.engine.lr}
        figures |= {"epoch": self.position[0]}
        self.console.step(self.step, figures)
        if self.writers:
            self.writers.scalars(self.step, figures)

    def validate(self) -> None:
        """Loss on held-out clips at fixed noise, with the averaged weights; the ranks share the work."""
        with self.meter.overhead(), self.engine.weights(self.ema.values), torch.no_grad():
            total = torch.zeros(2, dtype=torch.float64)
            for pack in self.parts.validation():
                loss = self.parts.task.loss(self.engine, pack, self.device)
                total += torch.tensor([float(loss.sum), self.parts.task.weight(pack)], dtype=torch.float64)
            dist.all_reduce(total)
        if total[1] > 0:
            value = (total[0] / total[1]).item()
            self.console.say(f"step {self.step}: validation loss {value:.4f}")
            if self.writers:
                self.writers.scalars(self.step, {"validation_loss": value})

    def sample(self) -> None:
        """Sample videos with the averaged weights."""
        with self.meter.overhead(), self.engine.weights(self.ema.values):
            videos = self.parts.sample(self.engine, self.step)
            dist.barrier()  # the ranks share the work
        if self.writers and videos:
            self.writers.videos(self.step, videos)

    def save(self) -> None:
        """Hand a copy of everything to the background writer."""
        with self.meter.overhead():
            split = (self.world.rank, self.world.size) if self.engine.stage == 0 else None
            mine = pieces(self.engine.fragments, self.ema.values, split)
            state = {
                "step": self.step, "applied": self.applied,
                "position": self.position, "plan_hash": self.parts.plan_hash,
                "ema_updates": self.ema.updates, "totals": asdict(self.meter.totals), "shapes": self.engine.shapes,
                "ranks": self.world.size, "stage": self.engine.stage, "time": time.time(),
            }  # fmt: skip
            self.checkpoints.save(self.step, mine, state)

    def resume(self) -> None:
        """Load the newest intact checkpoint, if there is one, and forget what was written after it."""
        newest = self.checkpoints.newest()
        if newest is not None:
            state = read_state(newest)
            load_into(newest, pieces(self.engine.fragments, self.ema.values, None))
            self.engine.write_weights({f.name: f.master for f in self.engine.fragments})
            self.step, self.applied, self.position = state["step"], state["applied"], tuple(state["position"])
            self.ema.updates = state["ema_updates"]
            self.engine.set_optimizer_steps(self.applied)
            self.meter.restore(state["totals"])
            if state["plan_hash"] != self.parts.plan_hash:
                self.console.say(
                    "the data or its packing changed since the checkpoint: going on at the same place of a new plan"
                )
            self.console.say(f"resumed {newest.name}, saved on {state['ranks']} rank(s) at ZeRO stage {state['stage']}")
        self.known = self.ledger.replayed(self.step)
        dist.barrier()
        if self.world.is_main:
            self.ledger.cut(self.step)
        dist.barrier()

    def leave(self, code: int, reason: str) -> int:
        """Finish what is in the background."""
        if not self.checkpoints.wait() and code == STOPPED:
            code, reason = 1, "stopped by a signal, but the checkpoint could not be written"
        self.console.say(f"step {self.step}/{self.config.steps}: {reason}")
        return code

    def close(self) -> None:
        """Finish the checkpoint under way and the dashboards, however the run ended."""
        self.checkpoints.wait()
        self.console.close()
        if self.writers:
            self.writers.close()


@dataclass(frozen=True)
class Agreement:
    """What all ranks know of a step: loss-bearing weight, samples, refusals, tokens, and whether to stop after it."""

    weight: float
    arrived: int
    refused: int
    tokens: int
    stop: bool
