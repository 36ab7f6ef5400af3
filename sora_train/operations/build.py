"""Build a run from its configuration: plan, networks, engines and trainer."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sora_train.config.cost import geometry, keep_cost, training_cost
from sora_train.config.hydra import write_exit
from sora_train.config.load import to_dict
from sora_train.config.registry import AUGMENTATIONS, METHODS
from sora_train.config.schema import Config, Previews
from sora_train.core.batch import Pack, Refusal
from sora_train.core.cli import InputError
from sora_train.core.world import World
from sora_train.data.augment import augmented
from sora_train.data.left_out import left_out
from sora_train.data.loader import Loader, Sharing, Step, passes_of_rank, refusals
from sora_train.data.order.curriculum import Stages
from sora_train.data.order.plan import Plan, Position
from sora_train.data.read.pool import Pool
from sora_train.data.shards import Shards
from sora_train.encoding.captions import count_tokens
from sora_train.evaluation.registry import choose
from sora_train.methods.base import Learner
from sora_train.models.layers import ulysses
from sora_train.operations.advice import advice
from sora_train.operations.evaluation import RunEvaluation
from sora_train.operations.held_out import PreviewClips, Previewer, PromptClips, validation_packs, write_previews
from sora_train.operations.inputs import note_inputs
from sora_train.operations.preflight import facts, require_agreement
from sora_train.operations.trained import load_starting_weights
from sora_train.training.engine.engines import Engines
from sora_train.training.health.guard import Guard
from sora_train.training.health.watch import Watch
from sora_train.training.parts import Marks, Parts
from sora_train.training.report.console import Console
from sora_train.training.report.meter import Meter, peak_flops
from sora_train.training.report.profiling import record_memory
from sora_train.training.report.writers import Writers
from sora_train.training.state.ledger import Ledger
from sora_train.training.state.mirror import Mirror
from sora_train.training.trainer import Trainer


def build_trainer(config: Config, world: World, device: torch.device, shards: Shards, pool: Pool) -> Trainer:
    """Build one rank's trainer. Collective; the process group must exist and the shards must be indexed."""
    d, logging, run_dir = config.data, config.logging, Path(config.run_dir)
    passes = passes_of_rank(d.slots, world.data_rank, world.data_size, config.parallel.accumulation)
    plan, held_out = shards.plan(config), shards.held_out(config)
    shared = {"ranks that can share a pack": str(world.sharing(d.pack_slots))}
    require_agreement(facts(config, _name(device), plan.index.fingerprint) | shared)
    _share(plan, run_dir, world)
    if world.is_main:
        keep_cost(config)
    ledger = _ledger(run_dir, world, plan, held_out)
    if logging.memory_history:
        record_memory()
    groups = ulysses.sequence_groups(world, d.pack_slots)
    sharing = Sharing((world.sequence_rank, world.sequence), world.sharing(d.pack_slots))
    learner = build_learner(config, device, groups)
    engines = Engines(learner.networks, len(passes), config)
    peak = peak_flops(device, logging.peak_tflops)
    meter = Meter(geometry(config), training_cost(config), device, peak, d.slots * d.max_tokens)
    console = Console(config.steps, world.is_main, run_dir)
    for line in _opening(config, world, held_out, pool, _summary(config, world, plan, engines, len(passes))):
        console.say(line)

    def steps_from(taken: int, position: tuple[int, ...], known: dict[Any, Refusal]) -> Iterator[Step]:
        steps = Loader(
            plan, pool, passes, Position(*position), d.prefetch_steps, known, pin=device.type == "cuda", taken=taken,
            cache_bytes=d.decoded_mib << 20, sharing=sharing, augment=_augmentation(d.augment),
        )  # fmt: skip
        return ulysses.same_clips(steps, groups)

    def validation() -> Iterator[Pack]:
        if held_out is None:
            return iter(())
        return validation_packs(held_out, pool, passes, logging.validation_clips, groups, sharing)

    preview = partial(learner.preview, engines)
    together = groups if world.sequence > 1 else None
    previews = _previews(config, shards, held_out, pool, together)

    def sample(step: int, break_off: Callable[[], bool]) -> dict[str, Path]:
        folder = run_dir / "samples" / f"step-{step:06d}"
        return write_previews(Previewer(preview, world, break_off), previews.get(), folder, d.made_fps)

    evaluation = _evaluation(config, held_out, PreviewClips(lambda: held_out, pool, logging.evaluate_clips, together))

    def evaluate(break_off: Callable[[], bool]) -> Marks:
        assert evaluation is not None and logging.evaluate_every
        return evaluation.marks(Previewer(preview, world, break_off))

    def open_writers(step: int) -> Writers | None:
        return _writers(config, step) if world.is_main else None

    limits = config.guard
    watch = Watch(run_dir / "logs", limits.timeout_s, limits.slow_timeout_s, partial(write_exit, run_dir, 1))
    parts = Parts(
        learner, engines, meter, open_writers, console, plan, steps_from, validation, sample, evaluate, ledger,
        Mirror.of(config) if world.is_main else None, Guard(), watch,
    )  # fmt: skip
    return Trainer(config, world, device, parts)


def _augmentation(name: str) -> Callable[[np.ndarray, str, int], tuple[np.ndarray, str]] | None:
    return partial(augmented, name, AUGMENTATIONS.get(name)) if name else None


def _previews(
    config: Config, shards: Shards, held_out: Plan | None, pool: Pool, groups: ulysses.Groups | None
) -> PromptClips | PreviewClips:
    """The clips whose captions are sampled while the run trains."""
    if config.logging.prompts:
        return PromptClips(config)
    # training clips need a plan of their own: the run's is shared by the ranks and moves on
    source = (lambda: held_out) if config.logging.previews is Previews.held_out else partial(shards.plan, config)
    return PreviewClips(source, pool, config.logging.sample_clips, groups)


def _share(plan: Stages, run_dir: Path, world: World) -> None:
    """Have the ranks of a node keep one copy of the plan."""
    if world.local_size > 1:
        run = hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:8]
        plan.share(run, owner=world.local_rank == 0)


def _ledger(run_dir: Path, world: World, plan: Stages, held_out: Plan | None) -> Ledger:
    """The ledger of a rank. What the indexes refuse is noted before the engines' first collective, hence before any
    rank refuses a sample."""
    ledger = Ledger(run_dir, world.rank)
    if world.is_main:
        if not any((run_dir / "checkpoints").glob("step-*")):
            ledger.forget_rollbacks()
        indexes = [plan.index, *([held_out.index] if held_out else [])]
        ledger.refused_before([r for index in indexes for r in refusals(index)])
    return ledger


def _opening(config: Config, world: World, held_out: Plan | None, pool: Pool, summary: str) -> Iterator[str]:
    """Lines that a run begins with: its summary, inputs that have changed, decoders that are missing."""
    yield summary
    if world.is_main:
        yield from note_inputs(config, held_out.index.fingerprint if held_out else "")
    for name, error in pool.load_errors().items():
        if error:
            yield f"warning: the decoder {name} can't be loaded here and is left out: {error}"


def build_learner(config: Config, device: torch.device, groups: ulysses.Groups) -> Learner:
    """Build the networks of a run on this rank's device, initialised from the seed or from `init_from`."""
    torch.manual_seed(config.seed)
    learner: Learner = METHODS.get(config.method).learner(config, device)
    if config.init_from is not None:
        load_starting_weights(learner.networks, config.init_from)
    for network in learner.networks.values():
        module: Any = network.module.to(device)
        if not network.trained:
            module.eval().requires_grad_(False)
        elif groups.neighbours:
            module.split_sequence(groups)
    return learner


def _evaluation(config: Config, held_out: Plan | None, clips: PreviewClips) -> RunEvaluation | None:
    """The evaluation of a run's samples, if there is to be one; metrics that can't be had are refused at the start."""
    if not config.logging.evaluate_every:
        return None
    if not METHODS.get(config.method).makes_videos:
        raise InputError(f"logging.evaluate_every: method={config.method} makes no videos; set it to 0")
    if held_out is None:
        raise InputError("logging.evaluate_every needs held-out clips; name shards in data.validation, or set it to 0")
    return RunEvaluation(clips, held_out, choose(config.logging.metrics, {}), config.checkpoint.best)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _writers(config: Config, step: int) -> Writers:
    run_dir = Path(config.run_dir).resolve()
    run_id = re.sub(r"[^\w.-]+", "-", run_dir.name) + "-" + hashlib.sha256(str(run_dir).encode()).hexdigest()[:8]
    logging = config.logging
    return Writers(
        run_dir, run_id, to_dict(config), logging.writers, config.steps, logging.project, resume_step=step,
        group=logging.group, tags=logging.tags, prometheus_port=logging.prometheus_port,
        wandb_finish_s=logging.wandb_finish_s,
    )  # fmt: skip


def _summary(config: Config, world: World, plan: Stages, engines: Engines, passes: int) -> str:
    parameters = sum(torch.Size(shape).numel() for shape in engines.shapes.values())
    usable, refused = int(plan.index.usable.sum()), int((~plan.index.usable).sum())
    groups = world.data_size
    idle = -(-config.data.slots // groups) * groups - config.data.slots
    lines = [
        f"{config.method}: {parameters / 1e6:.2f}M parameters, {config.precision.value}, "
        f"ZeRO stage {engines.stage}, {world.size} rank(s), {config.data.slots} slot(s) in {passes} pass(es) per rank",
        f"data: {usable - plan.filtered} samples in {len(plan.index.shards)} shard(s)"
        + (f", {plan.filtered} left out by filters" if plan.filtered else "")
        + (f", {refused} refused by the index" if refused else ""),
    ]
    if idle:
        share = idle / (config.data.slots + idle)
        lines.append(
            f"warning: {config.data.slots} slots don't divide by {groups} group(s) of ranks; "
            f"{share:.0%} of the places idle"
        )
    most, sharing = config.data.pack_slots, world.sharing(config.data.pack_slots)
    if sharing < most:
        lines.append(
            f"warning: data.pack_slots={most}, but at most {sharing} of these {world.size} rank(s) can share a pack "
            f"(they are {world.local_size} on this machine): a rank may hold {most // sharing} slots of a long clip"
        )
    lines += advice(config)
    return "\n".join([*lines, *left_out(config, plan, partial(count_tokens, config))])
