"""Clips completed from some of their own frames: what `evaluate tasks=[...]` asks of each task, and what it measures.

Given frames must come back as the VAE gives them back; what is made between or beside them must show what the caption
says, be where the real clip has it, and join on without a jump.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from rich.table import Table

from sora_train.config.cost import geometry
from sora_train.config.schema import Config
from sora_train.core.cli import InputError, nearest
from sora_train.demo_world.judge import Counts, judge
from sora_train.encoding.vae import FrozenVae
from sora_train.evaluation.motion import changes, median_interval, path_error, seam_jumps
from sora_train.evaluation.pixels import psnr
from sora_train.flow.ode import Request
from sora_train.generation.requests import Prompt, Shot

TASKS = ("image_to_video", "extension", "extension_backwards", "interpolation")
MEASURES = {  # in the table and in the JSON
    "given_db": "given frames, dB", "vae_db": "the same through the VAE, dB", "path": "object off by, sides",
    "still": "off by if it stood still", "seam": "change at seams / elsewhere", "vae_seam": "through the VAE",
}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """How many frames of a clip are given at its beginning and at its end; those between are made."""

    before: int
    after: int

    def made(self, frames: int) -> slice:
        """The made frames of a clip of `frames`."""
        return slice(self.before, frames - self.after)

    def given(self, frames: int) -> list[int]:
        """The given ones."""
        return [n for n in range(frames) if not self.before <= n < frames - self.after]


def part_of(task: str, frames: int, stride: int) -> Part:
    """What is given of a clip of `frames` at a VAE's temporal stride: an image, half of the latents, or both ends.

    Raises InputError for another task.
    """
    half = (1 + (frames - 1) // stride) // 2  # latent frames; the first holds one frame alone
    known = dict(zip(TASKS, (Part(1, 0), Part(1 + (half - 1) * stride, 0), Part(0, half * stride), Part(1, stride)),
                     strict=True))  # fmt: skip
    if task not in known:
        raise InputError(f"tasks={task}; {nearest(task, list(TASKS))}")
    return known[task]


def request_of(config: Config, vae: FrozenVae, frames_THWC: np.ndarray, caption: str, part: Part, seed: int) -> Request:
    """The request to complete a clip, made as `sample` makes it. An end is encoded after one more frame before it."""
    stride = config.vae.temporal_stride
    latents = max(geometry(config).grid(part.before, 1, 1)[0] if part.before else 0, part.after // stride)
    prompt = Prompt(
        [Shot(float("inf"), caption)],
        before=frames_THWC[: part.before] if part.before else None,
        after=frames_THWC[len(frames_THWC) - part.after - 1 :] if part.after else None,
        most=latents,
    )
    return prompt.request(config, vae, (len(frames_THWC), *frames_THWC.shape[1:3]), seed)


def measure(made_THWC: np.ndarray, real_THWC: np.ndarray, through_vae_THWC: np.ndarray, part: Part) -> dict[str, float]:
    """The figures of MEASURES for one completed clip, beside the real one and that one through the VAE."""
    frames = len(real_THWC)
    given, inside = part.given(frames), part.made(frames)
    count = inside.stop - inside.start
    nearest_given = real_THWC[[part.before - 1 if part.before else frames - part.after]].repeat(count, axis=0)
    seams = [at for at in (part.before, frames - part.after) if 0 < at < frames]
    return {
        "given_db": psnr(made_THWC[given], real_THWC[given]),
        "vae_db": psnr(through_vae_THWC[given], real_THWC[given]),
        "path": path_error(made_THWC[inside], real_THWC[inside]),
        "still": path_error(nearest_given, real_THWC[inside]),
        "seam": seam_jumps(changes(made_THWC), seams)[0],
        "vae_seam": seam_jumps(changes(through_vae_THWC), seams)[0],
    }


def marks(videos: Sequence[np.ndarray], scenes: Sequence[Mapping[str, object]], part: Part) -> Counts:
    """How often the part that was made shows what the scene says, by measure."""
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for video, scene in zip(videos, scenes, strict=True):
        verdict = judge(video[part.made(len(video))], scene)
        total.update(verdict.keys())
        right.update(name for name, is_right in verdict.items() if is_right)
    return {name: (right[name], total[name]) for name in total}


def summary(figures: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, dict[str, tuple[float, float, float]]]:
    """Median and 95% interval of each measure of each task."""
    return {
        task: {name: median_interval([one[name] for one in clips]) for name in MEASURES}
        for task, clips in figures.items()
    }


def figures_table(summed: Mapping[str, Mapping[str, tuple[float, float, float]]]) -> Table:
    """A line per task, a column per measure."""
    table = Table(title="median over clips, with 95% intervals")
    table.add_column("task")
    for title in MEASURES.values():
        table.add_column(title, justify="right")
    for task, row in summed.items():
        digits = {name: 1 if name.endswith("db") else 3 for name in row}
        cells = ["{:.{n}f} ({:.{n}f} to {:.{n}f})".format(*row[name], n=digits[name]) for name in row]
        table.add_row(task.replace("_", " "), *cells)
    return table
