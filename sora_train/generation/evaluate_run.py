"""Evaluates a run: chooses tasks and clips, and writes the results to the run folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console

from sora_train.core.world import World
from sora_train.data.order.plan import Plan
from sora_train.evaluation.commands import Options
from sora_train.evaluation.completion import part_of
from sora_train.evaluation.folder import read_prompts
from sora_train.evaluation.layouts import wanted
from sora_train.evaluation.metric import Part
from sora_train.evaluation.outcome import Outcome, conclude
from sora_train.evaluation.page import evaluation_page
from sora_train.evaluation.results import SAMPLES, write_json, write_text
from sora_train.generation.benchmark_videos import Output, seconds_of, write_videos
from sora_train.generation.cases import Case, Task, cases, prompt_cases
from sora_train.generation.evaluator import Evaluator
from sora_train.generation.safeguards import NO_SAFEGUARDS, Safeguards
from sora_train.generation.sampler import Sampler

FROM_CAPTIONS = "evaluation"  # folder of the samples, beside those of each task


def evaluate_run(
    o: Options, sampler: Sampler, checkpoint: str, plan: Plan | None, world: World,
    safeguards: Safeguards = NO_SAFEGUARDS,
) -> int:  # fmt: skip
    """Evaluate a run on the clips of a plan, or on the prompts of a file, or write a benchmark's videos with it.

    Args:
        o: Options of `evaluate`.
        sampler: The model.
        checkpoint: Name of its checkpoint.
        plan: Plan of the clips; None for the prompts of `o.prompts`.
        world: The ranks, which share the samples.
        safeguards: Check, mark and signature of the samples.

    Returns:
        The exit code.
    """
    if o.format:
        every = wanted(o.format, o.prompts)
        out, seconds = Path(o.out or f"{o.run_dir}/{o.format}"), seconds_of(o.format, o.seconds)
        write_videos(sampler, every, Output(out, o.seed, seconds, o.images), world, safeguards)
        return 0
    evaluator = Evaluator(sampler, checkpoint, o.judges(), world, safeguards)
    outcomes = _on_prompts(evaluator, o) if plan is None else _on_clips(evaluator, plan, o)
    if world.is_main:
        _write(o.run_dir, outcomes)
    return 0


def _on_clips(evaluator: Evaluator, plan: Plan, o: Options) -> dict[str, Outcome]:
    """Evaluate each task, or sampling from captions, on the clips of a plan; returns the outcomes by name."""
    config = evaluator.sampler.config
    frames, stride = config.data.max_frames, config.vae.temporal_stride
    parts: dict[str, Part | None] = {name: part_of(name, frames, stride) for name in o.tasks}
    outcomes = {}
    for name, part in (parts or {FROM_CAPTIONS: None}).items():
        task = Task(name, o.count, o.seed, part)
        about = {"split": "shards" if o.shards else o.split, "clips": plan.hash}
        outcomes[name] = _outcome(evaluator, cases(config, plan, task), task, about)
    return outcomes


def _on_prompts(evaluator: Evaluator, o: Options) -> dict[str, Outcome]:
    """Sample the prompts of a file; returns the outcome under the file's name without its ending."""
    rows = read_prompts(o.prompts)
    task = Task(Path(o.prompts).stem, min(o.count, len(rows)), o.seed)
    known = hashlib.sha256(Path(o.prompts).read_bytes()).hexdigest()
    clips = prompt_cases(evaluator.sampler.config, rows, task)
    return {task.name: _outcome(evaluator, clips, task, {"prompts": o.prompts, "clips": known})}


def _outcome(evaluator: Evaluator, clips: Iterable[Case], task: Task, about: dict[str, str]) -> Outcome:
    run = Path(evaluator.sampler.config.run_dir)
    columns = evaluator.evaluate(clips, task, run / "evaluation" / f"{task.name}-{_identity(evaluator, task, about)}")
    title = f"{run.name}, {evaluator.checkpoint}, {task.name.replace('_', ' ')}"
    about |= {"run": str(run), "checkpoint": evaluator.checkpoint, "task": task.name}
    return conclude(title, {**about, "seed": task.seed}, evaluator.judges, columns)


def _write(run_dir: str, outcomes: dict[str, Outcome]) -> None:
    """Print the tables; write run_dir/evaluation.json, or evaluation/NAME.json for completion and prompts."""
    console = Console()
    for name, outcome in outcomes.items():
        outcome.show(console)
        path = Path(run_dir) / ("evaluation.json" if name == FROM_CAPTIONS else f"evaluation/{name}.json")
        write_json(path, outcome.as_json())
        curves = _history(Path(run_dir) / "evaluation" / f"{name}.jsonl", outcome)
        samples = Path(run_dir) / "samples" / name
        files = {v.name: _sample(samples, n) for n, v in enumerate(outcome.columns[SAMPLES])}
        page = path.with_suffix(".html")
        page.write_text(evaluation_page(outcome, files, curves), encoding="utf-8")
        print(f"{path}, {page}, samples in {samples}")


def _sample(folder: Path, number: int) -> Path:
    """Path of a sample: a video, or a PNG if it has one frame."""
    video = folder / f"{number:04d}.mp4"
    return video if video.is_file() else video.with_suffix(".png")


def _history(path: Path, outcome: Outcome) -> dict[str, list[tuple[int, float]]]:
    """Add the figures of this checkpoint to the file `path`; returns the curves of all comparable evaluations.

    The curves are lists of (step, value) by figure, over all checkpoints evaluated on the same clips with the same seed
    and count.
    """
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    now = {row.name: row.cells[SAMPLES].value for row in outcome.rows if SAMPLES in row.cells}
    now |= {figure.name: figure.made.value for figure in outcome.distances.get(SAMPLES, [])}
    name, _, number = outcome.about["checkpoint"].rpartition("-")
    step = int(number) if name == "step" else 0  # an export has no steps
    alike = {key: outcome.about.get(key) for key in ("clips", "seed")} | {"count": len(outcome.columns[SAMPLES])}
    lines = [line for line in lines if line["step"] != step or line["alike"] != alike]
    lines.append({"step": step, "alike": alike, "figures": now})
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
    curves: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        for name, value in line["figures"].items() if line["alike"] == alike else ():
            curves.setdefault(name, []).append((line["step"], value))
    return curves


def _identity(evaluator: Evaluator, task: Task, about: Mapping[str, str]) -> str:
    """Name of an evaluation, a hash of checkpoint, settings and metrics."""
    config = evaluator.sampler.config
    what = {
        "checkpoint": evaluator.checkpoint, "clips": about["clips"], "task": asdict(task),
        "metrics": evaluator.judges.names, "flow": asdict(replace(config.flow, tasks={})),
    }  # fmt: skip
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()[:12]
