"""Puts a training run together: configuration to shards, plan, network, engine and trainer."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from sora_train.config.cost import cost, geometry, training_cost
from sora_train.config.hydra import write_exit
from sora_train.config.load import to_dict
from sora_train.config.schema import Config, Method, Previews
from sora_train.core.batch import Clip, Pack, Refusal
from sora_train.core.cli import InputError
from sora_train.core.world import World
from sora_train.data.index.consolidated import load_consolidated
from sora_train.data.index.index import Index, expand, index_shards, load_index
from sora_train.data.loader import Loader, Step, passes_of_rank, refusals
from sora_train.data.order.curriculum import Stages, build_stages
from sora_train.data.order.filters import Filter, both
from sora_train.data.order.plan import Plan, PlanInputs, Position
from sora_train.data.read.decode import Limits
from sora_train.data.read.encoded import require
from sora_train.data.read.pool import Pool
from sora_train.data.read.store import Store
from sora_train.forecast.estimate import meta_network
from sora_train.forecast.out_of_memory import advice, is_out_of_memory, line
from sora_train.generation.sampler import build_vae, untrained_model
from sora_train.methods.base import METHODS, write_previews
from sora_train.methods.left_out import left_out
from sora_train.models.layers import ulysses
from sora_train.operations.preflight import facts, require_agreement
from sora_train.training.engine.optim import adamw
from sora_train.training.engine.zero import Engine
from sora_train.training.health.guard import Guard
from sora_train.training.health.watch import Watch
from sora_train.training.parts import Parts, Place
from sora_train.training.report.console import Console
from sora_train.training.report.meter import Meter, peak_flops
from sora_train.training.report.profiling import dump_memory, record_memory
from sora_train.training.report.writers import Writers
from sora_train.training.state.ledger import Ledger
from sora_train.training.trainer import Trainer

Group = ulysses.Group


class Shards:
    """The shard lists of a run, expanded; made before any process group, so that a missing shard costs a moment."""

    def __init__(self, config: Config) -> None:
        self.store, limits, self.probe = Store.of(config.data), config.data.limits, config.data.probe
        self.limits = Limits(limits.pixels, limits.frames, limits.bytes)
        self.training: list[str] = []
        self.source_of: list[str] = []  # each training shard's
        self.filters: list[str] = []
        for name, source in config.data.sources.items():
            Filter(config.data.filter)  # wrong ones are answered here
            Filter(source.filter, f"data.sources.{name}.filter")
            found = expand(source.shards, self.store)
            self.training += found
            self.source_of += [name] * len(found)
            self.filters += [both(config.data.filter, source.filter)] * len(found)
        self.validation = expand(config.data.validation, self.store)
        self.captioned = config.method is not Method.autoencoder  # which learns from pixels alone

    def index(self) -> None:
        """Index what has no index yet."""
        index_shards(self.training + self.validation, None, self.store, self.limits, self.probe)

    def plan(self, config: Config) -> Stages:
        """The plan of the training shards."""
        inputs = plan_inputs(config, self.filters, config.flow.tasks)
        if config.data.index:
            index: Index = load_consolidated(config.data.index, self.training, self.store, self.captioned)
        else:
            bad = config.data.max_bad_fraction
            index = load_index(self.training, self.store, bad, captioned=self.captioned)
        require(index.encoded(), config, "data.sources")
        return build_stages(index, self.source_of, config.data, inputs)

    def held_out(self, config: Config) -> Plan | None:
        """The plan of the validation shards, if there are any."""
        if not self.validation:
            return None
        filters = [config.data.filter] * len(self.validation)
        index = load_index(self.validation, self.store, captioned=self.captioned)
        require(index.encoded(), config, "data.validation")
        return Plan(index, plan_inputs(config, filters, {"text_to_video": 1.0}))


def plan_inputs(config: Config, filters: list[str], tasks: dict[str, float]) -> PlanInputs:
    """What the plan takes from a configuration, for shards with these filters."""
    d = config.data
    weighted = tuple(sorted((task, weight) for task, weight in tasks.items() if weight > 0))
    return PlanInputs(
        seed=config.seed, slots=d.slots, max_tokens=d.max_tokens, fill=d.fill, window=d.window, fps=d.fps,
        max_frames=d.max_frames, max_pixels=d.max_pixels, fit=d.fit.value, tasks=weighted,
        repeats=(1.0,) * len(filters), geometry=geometry(config), cost=cost(config), filters=tuple(filters),
        captions=tuple(sorted(d.captions.items())),
    )  # fmt: skip


def build_trainer(config: Config, world: World, device: torch.device, shards: Shards, pool: Pool) -> Trainer:
    """Everything of one rank's part in a run. The process group is up and the shards are indexed."""
    d, logging = config.data, config.logging
    passes = passes_of_rank(d.slots, world.data_rank, world.data_size, config.parallel.accumulation)
    plan, held_out = shards.plan(config), shards.held_out(config)
    require_agreement(facts(config, _name(device), plan.index.fingerprint))
    if world.local_size > 1:
        run = hashlib.sha256(str(Path(config.run_dir).resolve()).encode()).hexdigest()[:8]
        plan.share(run, owner=world.local_rank == 0)
    if world.is_main:  # before the engine's first collective, so that no rank has refused anything yet
        indexes = [plan.index, *([held_out.index] if held_out else [])]
        Ledger(Path(config.run_dir), world.rank).refused_before([r for index in indexes for r in refusals(index)])
    if logging.memory_history:
        record_memory()
    torch.manual_seed(config.seed)
    method = METHODS[config.method](config, device)
    method.network.to(device)
    group = ulysses.sequence_group(world)
    if world.sequence > 1:
        blocks: Any = method.network.get_submodule("dit.blocks")
        ulysses.apply(method.network, [block.self_attention for block in blocks], ulysses.Neighbours(group))
    optimizer = adamw(method.groups, config.optim)
    engine = Engine(method.network, optimizer, config.precision, len(passes), config.optim.clip, config.deepspeed)
    peak = peak_flops(device, logging.peak_tflops)
    meter = Meter(geometry(config), training_cost(config), device, peak, d.slots * d.max_tokens, world.sequence)
    console = Console(config.steps, world.is_main, Path(config.run_dir))
    console.say(_summary(config, world, plan, engine, len(passes)))
    for name, error in pool.load_errors().items():
        if error:
            console.say(f"warning: the decoder {name} can't be loaded here and is left out: {error}")

    def steps_from(taken: int, position: tuple[int, ...], known: dict[Any, Refusal]) -> Iterator[Step]:
        pin = device.type == "cuda"
        steps = Loader(plan, pool, passes, Position(*position), d.prefetch_steps, known, pin, taken)
        return ulysses.same_clips(steps, group)

    def validation() -> Iterator[Pack]:
        return _validation(held_out, pool, passes, logging.validation_clips, group) if held_out else iter(())

    def sample(live: nn.Module, step: int, break_off: Callable[[], bool]) -> dict[str, Path]:
        # a plan of its own: the run's is shared by the ranks of this machine, and has gone on
        source = held_out if logging.previews is Previews.held_out else shards.plan(config)
        clips = _preview_clips(source, pool, logging.sample_clips, group) if source else []
        folder = Path(config.run_dir) / "samples" / f"step-{step:06d}"
        return write_previews(method, live, clips, folder, d.fps, world, break_off)

    def open_writers(step: int) -> Writers | None:
        return _writers(config, step) if world.is_main else None

    run_dir, limits = Path(config.run_dir), config.guard
    watch = Watch(run_dir / "logs", limits.timeout_s, limits.slow_timeout_s, partial(write_exit, run_dir, 1))
    parts = Parts(
        method.task, engine, meter, open_writers, console, plan, steps_from, validation, sample, Guard(), watch
    )
    return Trainer(config, world, device, parts)


@dataclass
class Whereabouts:
    """Tells where a run stands; `where` is the trainer's, once there is one."""

    where: Callable[[], Place] = lambda: Place(0, "start")


@contextmanager
def out_of_memory(config: Config, world: World) -> Iterator[Whereabouts]:
    """Turn running out of memory into an InputError that says where, and what should fit.

    Where it is a GPU's memory, a snapshot of it is left in run_dir/logs.
    """
    known = Whereabouts()
    try:
        yield known
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        path = Path(config.run_dir) / "logs" / f"rank-{world.rank}.memory.pickle"
        snapshot = dump_memory(path) if isinstance(error, torch.OutOfMemoryError) else ""

        def network() -> nn.Module:
            if config.method is Method.diffusion:
                return meta_network(untrained_model, config)
            return meta_network(build_vae, config.vae)

        available = (
            torch.cuda.mem_get_info()[1]
            if torch.cuda.is_available()
            else psutil.virtual_memory().total // world.local_size
        )
        place = known.where()
        change = advice(place.phase, config, network, world.size, available)
        raise InputError(line(place, change, snapshot)) from error


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _validation(plan: Plan, pool: Pool, passes: list[list[int]], clips: int, group: Group) -> Iterator[Pack]:
    """This rank's packs of the first steps that together hold at least `clips` clips, as many on every rank."""
    steps, count = 0, 0
    for position, slots in plan.from_position(Position()):
        if count >= clips or position.epoch > 0:
            break
        steps, count = steps + 1, count + sum(map(len, slots))
    loader = Loader(plan, pool, passes, Position(), prefetch_steps=2)
    for step in ulysses.same_clips(islice(loader, steps), group):
        yield from step.packs


def _preview_clips(plan: Plan | Stages, pool: Pool, count: int, group: Group) -> list[Clip]:
    """The first clips of a plan that move, the same on every rank."""
    clips: list[Clip] = []
    everything = [list(range(plan.inputs.slots))]
    loader = Loader(plan, pool, everything, Position(), prefetch_steps=1)
    for step in ulysses.same_clips(islice(loader, 8), group):
        clips += [clip for pack in step.packs for clip in pack.clips if clip.visit.frames > 1]
        if len(clips) >= count:
            break
    return clips[:count]


def _writers(config: Config, step: int) -> Writers:
    run_dir = Path(config.run_dir).resolve()
    run_id = re.sub(r"[^\w.-]+", "-", run_dir.name) + "-" + hashlib.sha256(str(run_dir).encode()).hexdigest()[:8]
    logging = config.logging
    return Writers(
        run_dir, run_id, to_dict(config), logging.writers, config.steps, logging.project, step, logging.group,
        logging.tags, logging.prometheus_port, logging.wandb_finish_s,
    )  # fmt: skip


def _summary(config: Config, world: World, plan: Stages, engine: Engine, passes: int) -> str:
    parameters = sum(torch.Size(shape).numel() for shape in engine.shapes.values())
    usable, refused = int(plan.index.usable.sum()), int((~plan.index.usable).sum())
    groups = world.data_size
    idle = -(-config.data.slots // groups) * groups - config.data.slots
    lines = [
        f"{config.method.value}: {parameters / 1e6:.2f}M parameters, {config.precision.value}, "
        f"ZeRO stage {engine.stage}, {world.size} rank(s), {config.data.slots} slot(s) in {passes} pass(es) per rank",
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
    return "\n".join([*lines, *left_out(config, plan)])
