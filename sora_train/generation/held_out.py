"""Samples a model for clips of its data and judges them, a unit of clips at a time.

A unit is a fixed run of clips whose samples are made together. Its figures don't depend on who makes it, and they are
kept in a file of its own: ranks share the units out, and a run that was killed goes on with those that are missing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from sora_train.config.cost import geometry
from sora_train.config.schema import Config
from sora_train.core.batch import Visit
from sora_train.core.cli import InputError
from sora_train.core.pixels import to_video
from sora_train.core.world import World
from sora_train.data.index.index import Index
from sora_train.data.loader import Loader
from sora_train.data.order.plan import Plan, Position
from sora_train.data.read.pool import Pool
from sora_train.evaluation.completion import standing_still
from sora_train.evaluation.metric import Part, Sample
from sora_train.evaluation.results import REAL, SAMPLES, STILL, THROUGH_VAE, Judged, Judges
from sora_train.flow.ode import Request
from sora_train.generation.requests import Prompt, Shot, Size, clip_size
from sora_train.generation.sampler import FrozenVae, Sampler, request_for, save_sample

UNIT = 16  # clips


@dataclass(frozen=True)
class Case:
    """What a sample is made for: what is known of it, its size (frames, height, width), and the real clip if any."""

    sample: Sample
    size: Size
    seed: int
    frames_THWC: np.ndarray | None = None


@dataclass(frozen=True)
class Task:
    """What is asked of a model: clips from their captions alone, or completed where `part` was made."""

    name: str
    count: int
    seed: int
    part: Part | None = None


def cases(config: Config, plan: Plan, task: Task) -> Iterator[Case]:
    """The first clips of a plan, cut as in training; raises InputError for shards without pixels.

    For completion these are clips of the full length, and in the demo world those of one moving object.
    """
    everything = [list(range(plan.inputs.slots))]
    found = 0
    with Pool.of(config.data) as pool:
        for step in Loader(plan, pool, everything, Position(), prefetch_steps=8):
            if step.position.epoch > 0:
                return
            for clip in step.packs[0].clips:
                if clip.latents_CTHW is not None:
                    raise InputError("evaluate compares with pixels; name shards of videos in data.validation")
                fields = plan.index.captions(clip.visit.sample)[1]
                if not _shows_its_scene(plan.index, clip.visit, fields) or not _suits(config, clip.visit, fields, task):
                    continue
                fps = clip.visit.fps or config.data.fps
                frames = np.ascontiguousarray(clip.video_TCHW.permute(0, 2, 3, 1).numpy())
                sample = Sample(clip.key, clip.caption, fps, fields, task.part)
                yield Case(sample, (len(frames), *frames.shape[1:3]), task.seed + found, frames)
                found += 1
                if found >= task.count:
                    return


def _shows_its_scene(index: Index, visit: Visit, fields: Mapping[str, Any]) -> bool:
    """Whether a clip is long enough to show what its demo scene says; other clips have no scene."""
    if fields.get("scene") is None:
        return True
    stride = max(1, round(index.fps[visit.sample] / visit.fps)) if visit.fps else 1
    whole = visit.frames * stride + stride * 4 > index.frames[visit.sample]
    return bool(whole) or fields["scene"]["kind"] not in ("return", "behind")


def _suits(config: Config, visit: Visit, fields: Mapping[str, Any], task: Task) -> bool:
    one = fields.get("scene") is None or fields["scene"]["kind"] == "one"
    return task.part is None or (one and visit.frames == config.data.max_frames)


def prompt_cases(config: Config, rows: Mapping[str, Mapping[str, Any]], task: Task) -> list[Case]:
    """A case for each prompt of a file; `seconds`, `height` and `width` of a row say its size, where it has them.

    A size that the model wasn't trained on is scaled to the area that it was.
    """
    found = []
    for number, (name, row) in enumerate(rows.items()):
        height, width = (int(row.get(key) or 0) for key in ("height", "width"))
        shape = np.zeros((1, height, width, 3), np.uint8) if height and width else None
        frames, *area = clip_size(config, shape, None, None, float(row["seconds"]) if row.get("seconds") else None)
        fields = {key: value for key, value in row.items() if key != "caption"}
        sample = Sample(name, str(row["caption"]), config.data.fps, fields)
        found.append(Case(sample, (min(frames, config.data.max_frames), area[0], area[1]), task.seed + number))
    return found[: task.count]


@dataclass(frozen=True)
class Evaluator:
    """Samples with one model and judges, on this rank's share of the units."""

    config: Config
    sampler: Sampler
    judges: Judges
    world: World

    def evaluate(self, clips: Iterable[Case], task: Task, folder: Path) -> dict[str, list[Judged]]:
        """The figures of every clip by column; `folder` keeps the units of this very evaluation.

        Raises InputError where there is no clip.
        """
        folder.mkdir(parents=True, exist_ok=True)
        cases, world = iter(clips), self.world
        numbered = enumerate(iter(lambda: list(islice(cases, UNIT)), []))
        made, total = 0, -(-task.count // UNIT)
        for number, unit in track(numbered, f"sampling, {task.name}", total=total, disable=not world.is_main):
            path, made = folder / f"unit-{number:05d}.json", number + 1
            if number % world.size == world.rank and not path.is_file():
                _write(path, self._judge_unit(unit, task, number))
        if not made:
            raise InputError(f"the shards hold no clip to evaluate {task.name} on; give others as shards=[...]")
        _wait_for_all(world)
        columns: dict[str, list[Judged]] = {}
        for number in range(made):
            for column, videos in json.loads((folder / f"unit-{number:05d}.json").read_text()).items():
                columns.setdefault(column, []).extend(Judged(**video) for video in videos)
        return columns

    def _judge_unit(self, unit: Sequence[Case], task: Task, number: int) -> dict[str, list[Judged]]:
        vae = self.sampler.vae
        videos = {SAMPLES: self.sampler.in_batches([request_of(self.config, vae, case) for case in unit])}
        real = [case.frames_THWC for case in unit]
        clips = [frames for frames in real if frames is not None]
        if clips:
            videos |= {REAL: clips, THROUGH_VAE: [through_vae(vae, frames) for frames in clips]}
        if task.part is not None:
            videos[STILL] = [standing_still(frames, task.part) for frames in clips]
        columns = {
            column: [
                self.judges.judge(video, None if column == REAL else case.frames_THWC, case.sample)
                for video, case in zip(one, unit, strict=True)
            ]
            for column, one in videos.items()
        }
        for place, (case, made) in enumerate(zip(unit, videos[SAMPLES], strict=True), number * UNIT):
            folder = Path(self.config.run_dir) / "samples" / task.name
            _show(folder, place, case, made, columns[SAMPLES][place % UNIT])
        return columns


def _show(folder: Path, place: int, case: Case, made_THWC: np.ndarray, judged: Judged) -> None:
    """Write a sample; of a completed clip, with the clip itself below it."""
    about: dict[str, object] = {"prompt": case.sample.caption, "seed": case.seed, "figures": judged.figures}
    if case.sample.part is not None:
        about |= {"given": case.sample.part.given(len(made_THWC))}
        made_THWC = made_THWC if case.frames_THWC is None else np.concatenate((made_THWC, case.frames_THWC), axis=1)
    save_sample(folder, f"{place:04d}", made_THWC, case.sample.fps, about)


def request_of(config: Config, vae: FrozenVae, case: Case) -> Request:
    """The request for a clip from its caption, or to complete it as `sample` would from files.

    A given end is encoded after one more frame before it.
    """
    frames, part = case.frames_THWC, case.sample.part
    if part is None or frames is None:
        return request_for(config, case.sample.caption, case.size, case.seed)
    stride = config.vae.temporal_stride
    prompt = Prompt(
        [Shot(float("inf"), case.sample.caption)],
        before=frames[: part.before] if part.before else None,
        after=frames[len(frames) - part.after - 1 :] if part.after else None,
        most=max(geometry(config).grid(part.before, 1, 1)[0] if part.before else 0, part.after // stride),
    )
    return prompt.request(config, vae, case.size, case.seed)


def through_vae(vae: FrozenVae, frames_THWC: np.ndarray) -> np.ndarray:
    """The frames as the VAE gives them back: the best that a model on its latents can do."""
    return vae.decode(vae.encode(to_video(frames_THWC).transpose(0, 1).unsqueeze(0))[0])


def _write(path: Path, columns: Mapping[str, Sequence[Judged]]) -> None:
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps({column: [asdict(v) for v in videos] for column, videos in columns.items()}))
    temporary.replace(path)


def _wait_for_all(world: World) -> None:
    """Return when every rank is here, so that all units are written."""
    if world.size == 1:
        return
    import torch.distributed as dist

    dist.init_process_group("gloo", rank=world.rank, world_size=world.size)
    dist.barrier()
    dist.destroy_process_group()
