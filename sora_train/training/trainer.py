"""The training loop, and the parts of a step in the order in which it calls them.

It depends on a learner, engines and an iterator of packs, and on no method, model or data format. Longer than most
files, because the functions that `loop` calls are kept beside it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sora_train.config.schema import Config
from sora_train.core.batch import Pack
from sora_train.core.cli import STOPPED, InputError
from sora_train.core.world import World
from sora_train.training.agreement import Ahead, Numbers, Request, Taken
from sora_train.training.engine.optim import lr_factor
from sora_train.training.engine.power_ema import Snapshots
from sora_train.training.health.guard import BadShare
from sora_train.training.health.spikes import Health, Verdict, differing_ranks
from sora_train.training.parts import Noted, Parts, Place, Step
from sora_train.training.report.profiling import StepProfile
from sora_train.training.state.checkpoint import Checkpoints
from sora_train.training.state.checkpoint_format import Pieces, load_into, pieces, read_state


class Trainer:
    """Trains a run: resumes from its newest checkpoint, and ends with the last step or on a signal."""

    def __init__(self, config: Config, world: World, device: torch.device, parts: Parts) -> None:
        self.config, self.world, self.device, self.parts = config, world, device, parts
        self.engines, self.learner = parts.engines, parts.learner
        self.meter, self.console = parts.meter, parts.console
        self.run_dir = Path(config.run_dir)
        keep, self.mirror = config.checkpoint, parts.mirror
        every, limit, powers = keep.snapshot_every, keep.snapshots, self.engines.powers
        self.snapshots = Snapshots(self.run_dir, powers, every, limit, self.mirror) if powers.lengths else None
        self.checkpoints = Checkpoints(self.run_dir / "checkpoints", keep.keep, keep.keep_every, self.mirror)
        self.ledger = parts.ledger
        self.guard, self.bad = parts.guard, BadShare(config.data.max_bad_fraction)
        self.watch, self.health = parts.watch, Health(config.guard)
        self.profile = StepProfile(self.run_dir, world.rank, config.logging.profile_steps)
        self.causes: dict[str, int] = {}
        self.sizes: list[tuple[int, int, int]] = []  # frames, height, width of the clips in the current or last pack
        self.left_out: set[tuple[int, ...]] = set()  # positions of steps that rollbacks left out
        self.step, self.applied, self.position, self.stop = 0, 0, (0, 0, 0), False
        self.taken: Taken | None = None  # the last step, until its loss is sent to the other ranks
        self.best: tuple[float, int] | None = None  # best score of an evaluation, and its step
        self.reason = "failed; see the logs"  # why the run ended
        newest = self.checkpoints.newest()
        self.resume(newest)
        if self.step < config.steps:
            self.checkpoints.require_room(self.pieces())
        if self.mirror and newest:
            self.mirror.offer(newest)  # a run that was killed may not have uploaded it
        self.writers = parts.open_writers(self.step)

    def train(self) -> int:
        """Train under the hang watch; returns the exit code."""
        self.watch.start()
        try:
            return self.loop()
        finally:
            self.watch.stop()

    def loop(self) -> int:
        """Take steps until the last one, or until a signal; returns the exit code."""
        self.meter.start()
        batches, batch, agreed = self.start()
        while self.step < self.config.steps:
            self.profile.before(self.step + 1)
            assert batch is not None, "there is a step to take"
            self.begin(batch, agreed)
            ahead = self.ask(batches, self.step + 2)
            self.enter("forward and backward")
            factor = lr_factor(self.step, self.config.steps, self.config.optim)
            self.engines.set_pace(agreed.weight, factor, self.before_update)
            result = self.learner.step(self.engines, Noted(batch.packs, self.note))
            if result.applied:
                self.engines.update_averages()
            self.advance(batch, self.engines.loss.read(), result.applied)
            self.profile.after(self.step)
            self.meter.add(result.losses, agreed.weight)
            self.meter.step_done(int(agreed.arrived), int(agreed.tokens), int(agreed.refused), result.applied)
            self.bad.add(int(agreed.arrived), int(agreed.refused), self.causes)
            batch, agreed = self.hear(ahead)
            if self.went_back(ahead.taken, agreed.loss):
                batches, batch, agreed = self.start()
                continue
            self.report()
            if self.due(self.config.guard.hash_every) or self.saves():
                self.compare_ranks()
            if self.due(self.config.logging.validate_every):
                self.validate()
            if self.due(self.config.logging.sample_every):
                self.sample()
            if self.due(self.config.logging.evaluate_every):
                self.evaluate()
            if self.snapshots and self.due(self.snapshots.every):
                with self.watch.slow("save"), self.meter.overhead():
                    self.snapshots.save(self.step, self.engines.fragments, self.split, self.engines.shapes)
            if self.saves():
                self.save()
            if self.stop and self.step < self.config.steps:
                return self.leave(
                    STOPPED, f"stopped by {self.guard.received or 'a signal to another rank'} after saving"
                )
        return self.leave(0, "done")

    def start(self) -> tuple[Iterator[Step], Step | None, Numbers]:
        """Start to iterate over the steps from the current position on. Collective.

        Returns:
            Iterator of the steps after the first, the first step (None after the run's last), and its sums over ranks.
        """
        batches = self.batches()
        return batches, *self.hear(self.ask(batches, self.step + 1))

    def batches(self) -> Iterator[Step]:
        """Yield the plan's steps from the current position on, except those that rollbacks left out."""
        for batch in self.parts.steps_from(self.planned, self.position, self.known):
            if tuple(batch.position) not in self.left_out:
                yield batch

    @property
    def planned(self) -> int:
        """Number of steps of the plan before the current position: those taken and those left out."""
        return self.step + sum(position < tuple(self.position) for position in self.left_out)

    def enter(self, phase: str) -> None:
        """Announce a phase to the hang watch and the profiler. The first step has the long time-out, as it compiles."""
        self.profile.phase(phase)
        self.watch.phase(phase, slow=self.watch.step == 0)

    def where(self) -> Place:
        """Current step, phase and pack, for the message when the run fails."""
        phase = self.watch.doing
        pack = self.meter.about(self.sizes) if phase in ("forward and backward", "validation") else ""
        return Place(self.step, phase, pack)

    def note(self, pack: Pack) -> None:
        """Remember the sizes of the pack that is being computed, for the message when the run fails."""
        self.sizes = [clip.visit.size for clip in pack.clips]

    def before_update(self) -> None:
        """Wait until a save under way has copied the weights, which the optimizer step is about to change."""
        self.enter("optimizer step")
        self.settle()

    def saves(self) -> bool:
        """True if this step ends with a checkpoint."""
        is_best = self.best is not None and self.best[1] == self.step
        return self.due(self.config.checkpoint.every_steps) or self.stop or is_best

    def due(self, every: int) -> bool:
        """True if the current step is a multiple of `every` or the last one; always False for 0."""
        return every > 0 and (self.step % every == 0 or self.step == self.config.steps)

    def ask(self, batches: Iterator[Step], number: int) -> Ahead:
        """Load the next step, and start the all-reduce of this rank's numbers. Collective.

        Args:
            batches: Iterator of the steps.
            number: Number of the step to load; none is loaded after the run's last.
        """
        batch = None
        with self.meter.waiting():
            self.enter("data")
            if number <= self.config.steps:
                batch = next(batches)
        taken, self.taken = self.taken, None
        packs, refused = (batch.packs, batch.refused) if batch else ([], [])
        for refusal in refused:
            self.causes[refusal.cause] = self.causes.get(refusal.cause, 0) + 1
        mine = Numbers(
            weight=sum(self.learner.weight(pack) / pack.part[1] for pack in packs),
            arrived=len(batch.samples) if batch else 0,
            refused=len(refused),
            tokens=sum(self.meter.tokens(pack) for pack in packs if pack.part[0] == 0),
            stop=self.guard.wants_stop,
            loss=taken.own_loss if taken else 0.0,
        )
        return Ahead(batch, taken, Request(mine))

    def hear(self, ahead: Ahead) -> tuple[Step | None, Numbers]:
        """Wait for the all-reduce that `ask` started; it is complete unless a rank is late.

        Returns:
            The loaded step, and the sums over all ranks; their `weight` is at least 1.
        """
        self.enter("agreement")
        told = ahead.request.read()
        self.stop = self.stop or told.stop > 0
        return ahead.batch, replace(told, weight=max(told.weight, 1.0))

    def begin(self, batch: Step, agreed: Numbers) -> None:
        """Record the samples of a step that is about to be taken. Collective if samples are left out (`leave_out`)."""
        self.ledger.write(self.step + 1, batch.position, batch.samples, batch.refused)
        self.leave_out(batch, agreed)

    def leave_out(self, batch: Step, agreed: Numbers) -> None:
        """With `data.drop_refused`, exclude the samples that any rank refused from later epochs. Collective."""
        if not self.config.data.drop_refused or not agreed.refused:
            return
        rows = torch.zeros(self.world.size, int(agreed.refused), dtype=torch.int64)
        mine = [refusal.sample + 1 for refusal in batch.refused]
        rows[self.world.rank, : len(mine)] = torch.tensor(mine, dtype=torch.int64)
        dist.all_reduce(rows)
        samples = sorted(set((rows[rows > 0] - 1).tolist()))
        self.parts.plan.amend(batch.position, self.planned, self.config.data.prefetch_steps, samples)

    def told_to_stop(self) -> bool:
        """True if any rank got a stop signal. For long phases such as validation. Collective."""
        told = torch.tensor([self.guard.wants_stop or self.stop], dtype=torch.int32)
        dist.all_reduce(told, op=dist.ReduceOp.MAX)
        self.stop = bool(told.item())
        return self.stop

    def advance(self, batch: Step, own_loss: float, applied: bool) -> None:
        """Count a step, and advance the position to the next one.

        Args:
            batch: The step that was taken.
            own_loss: This rank's share of its loss.
            applied: False if the update was skipped because of a non-finite value.
        """
        epoch, window, step = batch.position
        self.step, self.position = self.step + 1, (epoch, window, step + 1)
        self.watch.step = self.step
        self.applied += applied
        self.taken = Taken(self.step, tuple(batch.position), own_loss, applied)
        if not applied:
            self.console.say(f"step {self.step}: a loss or gradient was not finite; nothing was changed")
            self.ledger.write_skipped(self.step, batch.position, batch.samples, own_loss)

    def went_back(self, taken: Taken | None, loss: float) -> bool:
        """Check the steps whose loss is known for spikes and non-finite values. Collective.

        Args:
            taken: The step before the last one.
            loss: Its loss, over all ranks.

        Returns:
            True if the run went back to a checkpoint.
        """
        if taken is not None and self.judge(taken, loss):
            return True
        if self.taken is None or not self.rests():
            return False
        last, self.taken = self.taken, None
        return self.judge(last, Request(Numbers(loss=last.own_loss)).read().loss)

    def judge(self, taken: Taken, loss: float) -> bool:
        """Judge a step by its loss over all ranks; True if the run went back to a checkpoint."""
        verdict = self.health.judge(taken.step, taken.position, loss, taken.applied)
        return verdict is not None and self.roll_back(verdict)

    def rests(self) -> bool:
        """True if a save, validation, preview or the run's end follows, so that the loss must be judged at once."""
        logging, keep = self.config.logging, self.config.checkpoint
        often = [logging.validate_every, logging.sample_every, logging.evaluate_every, keep.every_steps]
        snapshots = self.snapshots.every if self.snapshots else 0
        return self.stop or self.step == self.config.steps or any(map(self.due, [*often, snapshots]))

    def roll_back(self, verdict: Verdict) -> bool:
        """Roll back to the newest checkpoint before the bad steps, and exclude these from the plan.

        Returns:
            True after a rollback. False after a loss spike without such a checkpoint: training continues.

        Raises:
            InputError: No such checkpoint after non-finite steps, or more than `guard.max_rollbacks` rollbacks.
        """
        self.checkpoints.wait()
        older = self.checkpoints.newest(before=verdict.first)
        if older is None:
            if self.health.not_finite:
                raise InputError(
                    f"{verdict.reason}, and there is no checkpoint to go back to; lower optim.lr, or look at the "
                    f"samples in {self.ledger.skipped}"
                )
            self.console.say(f"warning: {verdict.reason}; there is no checkpoint to go back to")
            self.health.forget()
            return False
        if len(self.ledger.rollbacks()) >= self.config.guard.max_rollbacks:
            raise InputError(
                f"{verdict.reason}, after guard.max_rollbacks={self.config.guard.max_rollbacks} rollbacks already; "
                f"lower optim.lr, or look at the samples in {self.ledger.left_out} and {self.ledger.skipped}"
            )
        back_to = read_state(older)["step"]
        places = [position for step, position in verdict.guilty if step > back_to]
        dist.barrier()  # every rank must have read the number of rollbacks before the next one is written
        if self.world.is_main:
            self.ledger.write_left_out(self.step, back_to, verdict.reason, places)
        self.checkpoints.discard_after(back_to)
        if self.snapshots:
            self.snapshots.discard_after(back_to)
        self.console.say(f"warning: {verdict.reason}; back to step {back_to}, {len(places)} step(s) are left out")
        self.resume(older)
        self.left_out |= set(places)  # not read from the file, which a network file system may show late
        self.meter.start()
        if self.writers:
            self.writers.close()
        self.writers = self.parts.open_writers(self.step)
        return True

    def compare_ranks(self) -> None:
        """Raise RuntimeError if the weights differ between ranks, before they are saved."""
        differing = differing_ranks(self.engines.fingerprint())
        if differing:
            raise RuntimeError(
                f"step {self.step}: the weights of rank(s) {differing} differ from the others'; look for bad memory or "
                "a bad device there. Nothing was saved since; a restart goes on from the last checkpoint"
            )

    def report(self) -> None:
        """Log the figures since the last report, if the step is to be logged."""
        if not (self.due(self.config.logging.every_steps) or self.step == 1):
            return
        figures = self.meter.read() | self.engines.figures()
        figures |= {"epoch": self.position[0], "failed_saves": self.checkpoints.failed}
        if self.mirror:
            figures["failed_uploads"] = self.mirror.failed
        figures |= self.watch.stragglers()
        self.console.step(self.step, figures)
        if self.writers:
            self.writers.scalars(self.step, figures)

    def validate(self) -> None:
        """Log the loss of held-out clips at fixed noise, with the averaged weights. The ranks share the clips."""
        slow = self.watch.slow("validation")
        with slow, self.meter.overhead(), self.engines.averaged(), torch.no_grad():
            total = torch.zeros(2, dtype=torch.float64)
            for pack in self.parts.validation():
                if self.told_to_stop():
                    self.console.say(f"step {self.step}: validation broken off by a signal")
                    return
                self.note(pack)
                loss_sum = self.learner.validate(self.engines, pack)
                mine = torch.tensor([float(loss_sum), self.learner.weight(pack)], dtype=torch.float64)
                total += mine / pack.part[1]
            dist.all_reduce(total)
        if total[1] > 0:
            value = (total[0] / total[1]).item()
            self.console.say(f"step {self.step}: validation loss {value:.4f}")
            if self.writers:
                self.writers.scalars(self.step, {"validation_loss": value})

    def sample(self) -> None:
        """Log videos sampled with the averaged weights. The ranks share the work."""
        with self.watch.slow("samples"), self.meter.overhead(), self.engines.averaged():
            videos = self.parts.sample(self.step, self.told_to_stop)
            dist.barrier()  # the ranks share the work
        if self.writers and videos:
            self.writers.videos(self.step, videos)

    def evaluate(self) -> None:
        """Log metrics of samples for held-out clips, with the averaged weights; keep the best checkpoint."""
        with self.watch.slow("evaluation"), self.meter.overhead(), self.engines.averaged():
            marks = self.parts.evaluate(self.told_to_stop)
        if not marks.figures:
            self.console.say(f"step {self.step}: evaluation broken off by a signal")
            return
        if marks.score is not None and (self.best is None or marks.score > self.best[0]):
            self.best = marks.score, self.step
            self.checkpoints.keep_best(self.step)
        figures = ", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in marks.figures.items())
        best = f"; best at step {self.best[1]}" if self.best else ""
        self.console.say(f"step {self.step}: {figures}{best}")
        if self.writers:
            self.writers.scalars(self.step, {f"evaluation/{name}": value for name, value in marks.figures.items()})

    @property
    def split(self) -> tuple[int, int] | None:
        """Share `(rank, ranks)` of the tensors that this rank saves at stage 0, where every rank holds all of them."""
        return (self.world.rank, self.world.size) if self.engines.stage == 0 else None

    def pieces(self) -> Pieces:
        """Tensors that this rank saves."""
        engines = self.engines
        return pieces(engines.fragments, engines.ema.values, self.split, engines.powers.values)

    def save(self) -> None:
        """Start a checkpoint, which is copied and written in the background."""
        with self.watch.slow("save"), self.meter.overhead():
            engines, mine = self.engines, self.pieces()
            state = {
                "step": self.step, "applied": self.applied,
                "position": self.position, "plan_hash": self.parts.plan.hash,
                "before": self.parts.plan.before(self.position, self.planned), "amendments": self.parts.plan.amendments,
                "ema_updates": engines.ema.updates, "totals": asdict(self.meter.totals), "shapes": engines.shapes,
                "health": self.health.state(), "left_out": sorted(self.left_out),
                "best": self.best,
                "ranks": self.world.size, "stage": engines.stage, "time": time.time(),
                **engines.powers.state(),
            }  # fmt: skip
            self.checkpoints.save(self.step, mine, state)

    def settle(self) -> None:
        """Wait until the tensors of saves under way are copied."""
        self.checkpoints.settle()
        if self.snapshots:
            self.snapshots.settle()

    def resume(self, checkpoint: Path | None) -> None:
        """Load a checkpoint, if there is one, and remove the ledger's entries of later steps."""
        self.taken = None
        if checkpoint is not None:
            state = read_state(checkpoint)
            engines = self.engines
            engines.powers.restore(state)
            load_into(checkpoint, pieces(engines.fragments, engines.ema.values, None, engines.powers.values))
            engines.write_weights()
            self.step, self.applied, self.position = state["step"], state["applied"], tuple(state["position"])
            engines.ema.updates = state["ema_updates"]
            engines.set_optimizer_steps(self.applied)
            self.meter.restore(state["totals"])
            self.health.restore(state.get("health", {}))
            self.left_out = {tuple(position) for position in state.get("left_out", [])}
            self.best = tuple(state["best"]) if state.get("best") else None
            self.checkpoints.keep_best(self.best[1] if self.best else None)
            if state["plan_hash"] == self.parts.plan.hash:
                self.parts.plan.restore(state["amendments"])
            else:
                self.position, where = self._in_a_new_plan(state)
                self.console.say(
                    f"the data or its packing changed since the checkpoint: going on in a new plan, {where}"
                )
            self.console.say(
                f"resumed {checkpoint.name}, saved on {state['ranks']} rank(s) at ZeRO stage {state['stage']}"
            )
        self.left_out |= {position for positions in self.ledger.rollbacks() for position in positions}
        known = [self.ledger.replayed(self.step) if self.world.is_main else {}]  # read by one rank, for all
        dist.broadcast_object_list(known)
        self.known = known[0]
        if self.world.is_main:
            self.ledger.cut(self.step)
        dist.barrier()

    def _in_a_new_plan(self, state: dict[str, Any]) -> tuple[tuple[int, int, int], str]:
        """Compute the position from which to resume if the plan has changed since the checkpoint.

        From there, every sample of the epoch that wasn't visited yet is visited. It is the beginning of the current
        window if the earlier windows of the epoch have the same shards in the same order, else that of the epoch.

        Args:
            state: State of the checkpoint.

        Returns:
            The position (epoch, window, 0), and the end of a message that explains it.
        """
        epoch, window, taken = self.position
        if window == 0 or state.get("before") == self.parts.plan.before(self.position, self.planned):
            again = f"the {taken} step(s) taken of it are taken again"
            return (epoch, window, 0), f"at the beginning of window {window} of epoch {epoch}; {again}"
        again = f"so what the {window} window(s) before held, and {taken} step(s), are taken again"
        return (epoch, 0, 0), f"at the beginning of epoch {epoch}, as its shards are others; {again}"

    def leave(self, code: int, reason: str) -> int:
        """Wait for background saves and uploads, log the reason of the end, and return the exit code.

        It is 1 instead of 0 if the last checkpoint couldn't be written.
        """
        with self.watch.slow("save"):
            saved = self.checkpoints.wait()
            if self.snapshots:
                saved = self.snapshots.wait() and saved
            if self.mirror:
                self.mirror.finish(self.config.guard.slow_timeout_s / 2)  # below the watch's time-out
        if not saved and code == STOPPED:  # resumable: the next start repeats the steps since the last checkpoint
            reason = f"{reason.removesuffix(' after saving')}, but its checkpoint could not be written"
        elif not saved:
            code, reason = 1, f"{reason}, but the last checkpoint could not be written"
        self.reason = reason
        self.console.say(f"step {self.step}/{self.config.steps}: {reason}")
        return code

    def close(self) -> None:
        """Finish the checkpoint under way and close the writers, however the run ended.

        After a failure other ranks may have exited, so it waits at most `guard.timeout_s` for a save.
        """
        self.profile.close()
        if self.snapshots:
            self.snapshots.wait(self.config.guard.timeout_s)
        self.checkpoints.wait(self.config.guard.timeout_s)
        self.console.close()
        if self.writers:
            self.writers.close()
