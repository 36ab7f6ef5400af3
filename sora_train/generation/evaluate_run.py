"""Evaluates a run: by which tasks, on which clips, and what is left in the run folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.console import Console

from sora_train.config.schema import Config
from sora_train.core.world import World
from sora_train.data.order.plan import Plan
from sora_train.evaluation.completion import part_of
from sora_train.evaluation.metric import Part
from sora_train.evaluation.outcome import Outcome, conclude
from sora_train.evaluation.results import Judges, write_json
from sora_train.generation.held_out import Task, evaluate
from sora_train.generation.sampler import Sampler
from sora_train.training.state.checkpoint import latest_intact

_FROM_CAPTIONS = "evaluation"  # folder of the samples, beside those of each task


@dataclass(frozen=True)
class Asked:
    """What to evaluate a run on."""

    split: str
    tasks: Sequence[str]  # of completion; none: samples from captions
    count: int
    seed: int


def evaluate_run(
    config: Config, sampler: Sampler, plan: Plan, judges: Judges, asked: Asked, world: World
) -> dict[str, Outcome]:
    """The outcome of each task, or of sampling from captions; the same on every rank."""
    frames, stride = config.data.max_frames, config.vae.temporal_stride
    parts: dict[str, Part | None] = {name: part_of(name, frames, stride) for name in asked.tasks}
    run = Path(config.run_dir)
    checkpoint = latest_intact(run / "checkpoints").name
    outcomes = {}
    for name, part in (parts or {_FROM_CAPTIONS: None}).items():
        task = Task(name, asked.count, asked.seed, part)
        folder = run / "evaluation" / f"{name}-{_identity(config, plan, judges, task, checkpoint)}"
        columns = evaluate(config, sampler, plan, judges, task, folder, world)
        about = {
            "run": config.run_dir, "checkpoint": checkpoint, "split": asked.split, "seed": asked.seed, "task": name,
            "clips": plan.hash,
        }  # fmt: skip
        title = f"{run.name}, {checkpoint}, {name.replace('_', ' ')} on {asked.split}"
        outcomes[name] = conclude(title, about, judges, columns)
    return outcomes


def write(config: Config, outcomes: dict[str, Outcome]) -> None:
    """Print the tables and write run_dir/evaluation.json, or run_dir/tasks.json where clips were completed."""
    console = Console()
    for outcome in outcomes.values():
        outcome.show(console)
    alone = outcomes.get(_FROM_CAPTIONS)
    path = Path(config.run_dir) / ("tasks.json" if alone is None else "evaluation.json")
    found = {name: outcome.as_json() for name, outcome in outcomes.items()}
    write_json(path, found if alone is None else alone.as_json())
    print(f"figures in {path}, samples in {Path(config.run_dir) / 'samples'}")


def _identity(config: Config, plan: Plan, judges: Judges, task: Task, checkpoint: str) -> str:
    """A name for this very evaluation: another checkpoint, setting or metric has another."""
    what = {
        "checkpoint": checkpoint, "plan": plan.hash, "task": asdict(task), "metrics": judges.names,
        "flow": asdict(replace(config.flow, tasks={})),
    }  # fmt: skip
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()[:12]
