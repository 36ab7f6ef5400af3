"""Cases of an evaluation: captions of held-out clips, held-out clips to be completed, or the prompts of a file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sora_train.config.cost import geometry
from sora_train.config.schema import Config
from sora_train.core.batch import Visit
from sora_train.core.cli import InputError
from sora_train.data.index.index import Index
from sora_train.data.loader import first_clips
from sora_train.data.order.plan import Plan
from sora_train.data.read.pool import Pool
from sora_train.encoding.vae import FrozenVae
from sora_train.evaluation.metric import Part, Sample
from sora_train.flow.ode import Request
from sora_train.generation.requests import Prompt, Shot, Size, clip_size
from sora_train.generation.sampler import request_for


@dataclass(frozen=True)
class Case:
    """Case of an evaluation: facts of a sample, its size (frames, height, width), and the real clip if any."""

    sample: Sample
    size: Size
    seed: int
    frames_THWC: np.ndarray | None = None


@dataclass(frozen=True)
class Task:
    """Task of an evaluation: `count` clips, from their captions alone or, with `part`, completed from given frames."""

    name: str
    count: int
    seed: int
    part: Part | None = None


def cases(config: Config, plan: Plan, task: Task) -> Iterator[Case]:
    """Iterate over the first clips of a plan, cut as in training. Raises InputError for shards without pixels.

    For completion only clips of the full length are used, and of the demo world only those with one moving object.
    """
    found = 0
    with Pool.of(config.data) as pool:
        for clip in first_clips(plan, pool, prefetch_steps=8):
            if clip.latents_CTHW is not None:
                raise InputError("evaluate compares with pixels; name shards of videos in data.validation")
            fields = plan.index.captions(clip.visit.sample)[1]
            if not _shows_its_scene(plan.index, clip.visit, fields) or not _suits(config, clip.visit, fields, task):
                continue
            fps = clip.visit.fps or config.data.made_fps
            frames = np.ascontiguousarray(clip.video_TCHW.permute(0, 2, 3, 1).numpy())
            sample = Sample(clip.key, clip.caption, fps, fields, task.part)
            yield Case(sample, (len(frames), *frames.shape[1:3]), task.seed + found, frames)
            found += 1
            if found >= task.count:
                return


def _shows_its_scene(index: Index, visit: Visit, fields: Mapping[str, Any]) -> bool:
    """Tell whether a clip of the demo world is long enough to show its scene; True for clips without a scene."""
    if fields.get("scene") is None:
        return True
    stride = float(index.fps[visit.sample]) / visit.fps if visit.fps else 1.0
    whole = visit.frames * stride + stride * 4 > index.frames[visit.sample]
    return bool(whole) or fields["scene"]["kind"] not in ("return", "behind")


def _suits(config: Config, visit: Visit, fields: Mapping[str, Any], task: Task) -> bool:
    one = fields.get("scene") is None or fields["scene"]["kind"] == "one"
    return task.part is None or (one and visit.frames == config.data.max_frames)


def prompt_cases(config: Config, rows: Mapping[str, Mapping[str, Any]], task: Task) -> list[Case]:
    """Make a case for each of the first `task.count` prompts of a file.

    `rows` are the fields of each prompt by the name of its video. `height` and `width` of a row give the aspect ratio;
    the area is the trained one. `seconds` gives the length, at most the trained one.
    """
    found = []
    for number, (name, row) in enumerate(rows.items()):
        height, width = (int(row.get(key) or 0) for key in ("height", "width"))
        shape = (height, width) if height and width else None
        frames, *area = clip_size(config, shape, None, None, None)
        if row.get("seconds"):  # from the first frame to the last
            stride = config.vae.temporal_stride
            frames = min(frames, 1 + round(float(row["seconds"]) * config.data.made_fps) // stride * stride)
        fields = {key: value for key, value in row.items() if key != "caption"}
        sample = Sample(name, str(row["caption"]), config.data.made_fps, fields)
        found.append(Case(sample, (frames, area[0], area[1]), task.seed + number))
    return found[: task.count]


def request_of(config: Config, vae: FrozenVae, case: Case) -> Request:
    """Build the request for a clip from its caption, or to complete it from given frames as `sample` does.

    Frames given at the end are encoded with one more frame before them.
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
