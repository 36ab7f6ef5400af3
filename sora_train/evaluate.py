"""Measure a demo model: does a sample show what its held-out prompt says?

    python -m sora_train.evaluate run_dir=runs/demo [prompts=256] [seed=0]
    python -m sora_train.evaluate run_dir=runs/demo tasks=[image_to_video,extension,...] [prompts=48]
    python -m sora_train.evaluate run_dir=runs/own_model by_heart=true

Samples held-out captions and marks colour, shape, direction and returning identity with plain image analysis, beside
the same marks for the real held-out videos (is the measure right?), for those through the VAE (the ceiling), and
chance. Writes run_dir/evaluation.json and samples with contact sheets under run_dir/samples/evaluation.

With `tasks` (image_to_video, extension, extension_backwards, interpolation) held-out clips are completed from some of
their own frames, and the made part is marked alone; writes run_dir/tasks.json and samples under run_dir/samples/tasks.

With `by_heart` the captions are those of training clips, and what counts is how near each sample is to its clip: PSNR
against the clip as the VAE gives it back. For a run that learned a few videos by heart.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from omegaconf import MISSING
from rich.console import Console
from rich.progress import track

from sora_train.config.load import load
from sora_train.config.schema import Config
from sora_train.core.batch import Visit
from sora_train.core.cli import InputError, options, run
from sora_train.data.index.index import Index
from sora_train.data.loader import Loader
from sora_train.data.order.plan import Plan, Position
from sora_train.data.read.pool import Pool
from sora_train.data.shards import Shards
from sora_train.demo_world.judge import COLUMNS, Counts, as_json, judge, table
from sora_train.evaluation.completion import figures_table, marks, measure, part_of, request_of, summary
from sora_train.evaluation.pixels import psnr
from sora_train.generation.sampler import Sampler, request_for, save_sample
from sora_train.operations.trained import load_sampler

_SHOWN = 12  # samples written as files


@dataclass
class Options:
    """Command-line options."""

    run_dir: str = MISSING
    prompts: int = 256
    seed: int = 0
    by_heart: bool = False
    tasks: list[str] = field(default_factory=list)


@dataclass
class Case:
    """A clip with its prompt and what it shows (of the demo world)."""

    key: str
    visit: Visit
    caption: str
    scene: dict[str, object]
    frames_THWC: np.ndarray


def main() -> int:
    """Evaluate, print the table, write it."""
    o = options(Options, __doc__)
    config = load(o.run_dir)
    sampler = load_sampler(config, o.run_dir, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if o.by_heart:
        return _by_heart(config, sampler, o)
    plan = Shards(config).held_out(config)
    if plan is None:
        raise InputError("the run has no held-out shards (data.validation) to evaluate on")
    if o.tasks:
        return _tasks(config, sampler, plan, o)
    cases = list(_cases(config, plan, o.prompts, partial(_scene, plan.index)))
    columns: dict[str, list[np.ndarray]] = {
        COLUMNS[0]: _samples(config, sampler, cases, o.seed),
        COLUMNS[1]: [case.frames_THWC for case in cases],
        COLUMNS[2]: [_through_vae(sampler, case.frames_THWC) for case in cases],
    }
    rows = {name: _count(videos, cases) for name, videos in columns.items()}
    quality = float(np.mean([psnr(a, b) for a, b in zip(columns[COLUMNS[1]], columns[COLUMNS[2]], strict=True)]))
    Console().print(table(rows))
    print(f"{len(cases)} held-out prompts; the VAE reconstructs the held-out videos at {quality:.1f} dB PSNR")
    report = {"prompts": len(cases), "seed": o.seed, "vae_psnr_db": quality, "measures": as_json(rows)}
    (Path(o.run_dir) / "evaluation.json").write_text(json.dumps(report, indent=1) + "\n")
    _show(config, cases, columns[COLUMNS[0]], Path(o.run_dir) / "samples" / "evaluation")
    return 0


def _tasks(config: Config, sampler: Sampler, plan: Plan, o: Options) -> int:
    """Complete held-out clips of one moving object from some of their own frames, by every task asked for."""
    whole = config.data.max_frames
    cut = {task: part_of(task, whole, config.vae.temporal_stride) for task in o.tasks}  # wrong ones are answered here

    def moving(visit: Visit) -> dict[str, object] | None:
        scene = _scene(plan.index, visit)
        return scene if scene is not None and scene["kind"] == "one" and visit.frames == whole else None

    cases = list(_cases(config, plan, o.prompts, moving))
    if not cases:
        raise InputError(f"data.validation has no clip of one moving object, {whole} frames long")
    real, scenes = [case.frames_THWC for case in cases], [case.scene for case in cases]
    through = [_through_vae(sampler, frames) for frames in real]
    rows: dict[str, Counts] = {}
    figures, folder = {}, Path(o.run_dir) / "samples" / "tasks"
    for task, part in cut.items():
        requests = [
            request_of(config, sampler.vae, case.frames_THWC, case.caption, part, o.seed + n)
            for n, case in enumerate(cases)
        ]
        made = sampler.in_batches(requests)
        rows[task.replace("_", " ")] = marks(made, scenes, part)
        rows["real part"] = _added(rows.pop("real part", {}), marks(real, scenes, part))
        figures[task] = [measure(*videos, part) for videos in zip(made, real, through, strict=True)]
        for n, case in list(enumerate(cases))[:_SHOWN]:
            about = {"prompt": case.caption, "given": part.given(whole), **figures[task][n]}
            both = np.concatenate((made[n], real[n]), axis=1)
            save_sample(folder, f"{task}-{n:02d}", both, config.data.made_fps, about)
    summed = summary(figures)
    Console().print(table(rows), figures_table(summed))
    print(f"{len(cases)} held-out clips of {whole} frames; above in each sample what was made, below the clip itself")
    report = {"clips": len(cases), "seed": o.seed, "measures": as_json(rows), "figures": summed}
    (Path(o.run_dir) / "tasks.json").write_text(json.dumps(report, indent=1) + "\n")
    return 0


def _added(one: Counts, other: Counts) -> Counts:
    """Counts of both together."""
    none = (0, 0)
    return {
        name: (one.get(name, none)[0] + other.get(name, none)[0], one.get(name, none)[1] + other.get(name, none)[1])
        for name in {**one, **other}
    }


def _by_heart(config: Config, sampler: Sampler, o: Options) -> int:
    """Sample the captions of training clips and print how near each comes to its own clip."""
    plan = Shards(config).plan(config).plans[0]
    cases = list(_cases(config, plan, min(o.prompts, int(plan.index.usable.sum())), lambda visit: {}))
    samples = _samples(config, sampler, cases, o.seed)
    known = [_through_vae(sampler, case.frames_THWC) for case in cases]
    folder = Path(o.run_dir) / "samples" / "by_heart"
    report = []
    for number, (case, sample, target) in enumerate(zip(cases, samples, known, strict=True)):
        others = [psnr(sample, other) for other in known if other is not target and other.shape == target.shape]
        marks = {"psnr_db": psnr(sample, target), "vae_psnr_db": psnr(target, case.frames_THWC)}
        marks |= {"nearest_other_db": max(others)} if others else {}
        print(f"{case.key}: " + ", ".join(f"{name} {value:.1f}" for name, value in marks.items()))
        both = np.concatenate((sample, target), axis=2)
        fps = case.visit.fps or config.data.made_fps
        save_sample(folder, f"{number:02d}", both, fps, {"prompt": case.caption, **marks})
        report.append({"key": case.key, "prompt": case.caption, "size": list(case.visit.size), **marks})
    mean = float(np.mean([entry["psnr_db"] for entry in report]))
    print(f"{len(cases)} training clips: samples at {mean:.1f} dB PSNR against the clips as the VAE gives them back")
    (Path(o.run_dir) / "by_heart.json").write_text(json.dumps(report, indent=1) + "\n")
    return 0


Describe = Callable[[Visit], dict[str, object] | None]  # what a clip shows; None leaves it out


def _cases(config: Config, plan: Plan, count: int, describe: Describe) -> Iterator[Case]:
    """The first clips that `describe` knows, cut as in training."""
    everything = [list(range(plan.inputs.slots))]
    found = 0
    with Pool.of(config.data) as pool:
        for step in Loader(plan, pool, everything, Position(), prefetch_steps=8):
            if step.position.epoch > 0:
                return
            for clip in step.packs[0].clips:
                scene = describe(clip.visit)
                if clip.latents_CTHW is not None:
                    raise InputError("evaluate compares with pixels; name shards of videos in data.validation")
                if scene is not None and found < count:
                    found += 1
                    yield Case(clip.key, clip.visit, clip.caption, scene, clip.video_TCHW.permute(0, 2, 3, 1).numpy())
            if found >= count:
                return


def _scene(index: Index, visit: Visit) -> dict[str, object] | None:
    """What a clip shows; None where a cut out part needn't show it all."""
    _, fields = index.captions(visit.sample)
    if "scene" not in fields:
        raise InputError(f"{index.key[visit.sample]} describes no demo scene; evaluate measures the demo world only")
    scene = fields["scene"]
    stride = float(index.fps[visit.sample]) / visit.fps if visit.fps else 1.0
    whole = visit.frames * stride + stride * 4 > index.frames[visit.sample]
    return scene if whole or scene["kind"] not in ("return", "behind") else None


def _samples(config: Config, sampler: Sampler, cases: list[Case], seed: int) -> list[np.ndarray]:
    requests = [request_for(config, case.caption, case.visit.size, seed + n) for n, case in enumerate(cases)]
    videos: list[np.ndarray] = []
    for start in track(range(0, len(requests), 64), description="sampling held-out prompts"):
        videos += sampler.in_batches(requests[start : start + 64])
    return videos


def _through_vae(sampler: Sampler, frames_THWC: np.ndarray) -> np.ndarray:
    video = torch.from_numpy(np.ascontiguousarray(frames_THWC)).permute(3, 0, 1, 2).unsqueeze(0)
    return sampler.vae.decode(sampler.vae.encode(video)[0])


def _count(videos: list[np.ndarray], cases: list[Case]) -> Counts:
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for video, case in zip(videos, cases, strict=True):
        marks = judge(video, case.scene)
        total.update(marks.keys())
        right.update(name for name, is_right in marks.items() if is_right)
    return {name: (right[name], total[name]) for name in total}


def _show(config: Config, cases: list[Case], videos: list[np.ndarray], folder: Path) -> None:
    for n, (case, video) in enumerate(list(zip(cases, videos, strict=True))[:_SHOWN]):
        about = {"prompt": case.caption, "scene": case.scene, "marks": judge(video, case.scene)}
        save_sample(folder, f"{n:02d}", video, config.data.made_fps, about)


if __name__ == "__main__":
    run(main)
