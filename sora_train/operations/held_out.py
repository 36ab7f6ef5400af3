"""Validation packs and preview clips of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from sora_train.config.schema import Config
from sora_train.core.batch import Clip, Pack, Visit
from sora_train.core.world import World
from sora_train.data.loader import Loader, Sharing, first_clips
from sora_train.data.order.curriculum import Stages
from sora_train.data.order.plan import Plan, Position
from sora_train.data.read.pool import Pool
from sora_train.generation.output import save_sample
from sora_train.generation.requests import clip_size
from sora_train.models.layers import ulysses

Groups = ulysses.Groups


def validation_packs(
    plan: Plan, pool: Pool, passes: list[list[int]], clips: int, groups: Groups, sharing: Sharing
) -> Iterator[Pack]:
    """Yield this rank's packs of the first steps with at least `clips` clips in all; the same number on every rank."""
    steps, count = 0, 0
    for position, slots in plan.from_position(Position()):
        if count >= clips or position.epoch > 0:
            break
        steps, count = steps + 1, count + sum(map(len, slots))
    loader = Loader(plan, pool, passes, Position(), prefetch_steps=2, sharing=sharing)
    for step in ulysses.same_clips(islice(loader, steps), groups):
        yield from step.packs


class PreviewClips:
    """The clips of previews: the first videos (not images) of a plan, the same on every rank. Read once and cached.

    Args:
        source: Makes the plan.
        pool: Decodes the clips.
        count: Number of clips.
        groups: The ranks that share every preview's tokens, if there are any.
    """

    def __init__(
        self, source: Callable[[], Plan | Stages | None], pool: Pool, count: int, groups: Groups | None
    ) -> None:
        self._source, self._pool, self._count, self._groups = source, pool, count, groups
        self._clips: list[Clip] | None = None

    def get(self) -> list[Clip]:
        """Read the clips, or return the cached ones; fewer if the plan's first steps have fewer. Collective."""
        if self._clips is None:
            plan = self._source()
            moving = (lambda clip: clip.visit.frames > 1) if plan else None
            found = first_clips(plan, self._pool, lambda steps: ulysses.same_clips(steps, self._groups)) if plan else ()
            self._clips = list(islice(filter(moving, found), self._count))
        return self._clips


class PromptClips:
    """Clips of `logging.prompts`, without pixels: the caption of each, and the size that `sample` would give it."""

    def __init__(self, config: Config) -> None:
        frames, height, width = clip_size(config, None, None, None, None)
        place = ((height, width), (0, 0, height, width))
        self._clips = [
            Clip(
                Visit(-1, 0, frames, config.data.made_fps, *place, "text_to_video", number << 1), f"prompt {number}",
                prompt, torch.empty(0, 3, height, width, dtype=torch.uint8),
            )
            for number, prompt in enumerate(config.logging.prompts)
        ]  # fmt: skip

    def get(self) -> list[Clip]:
        """The clips."""
        return self._clips


@dataclass(frozen=True)
class Previewer:
    """Shares clips among the data-parallel groups, and generates a preview of each.

    Args:
        preview: Generates the frames of a clip.
        world: This rank.
        break_off: Called by all ranks before each preview; if it returns True, the rest is skipped.
    """

    preview: Callable[[Clip], np.ndarray]
    world: World
    break_off: Callable[[], bool]

    def each(self, clips: Sequence[Clip], use: Callable[[int, Clip, np.ndarray], None]) -> bool:
        """Call `use(place, clip, frames_THWC)` for this rank's share of the clips. Collective.

        Every rank runs the network equally often, as ZeRO-3 needs all ranks.

        Returns:
            False if it was broken off.
        """
        world = self.world
        for number in range(-(-len(clips) // world.data_size)):
            if self.break_off():
                return False
            place = number * world.data_size + world.data_rank
            clip = clips[min(place, len(clips) - 1)]
            with torch.no_grad():
                frames = self.preview(clip)
            if place < len(clips) and world.sequence_rank == 0:
                use(place, clip, frames)
        return True


def write_previews(previewer: Previewer, clips: Sequence[Clip], folder: Path, fps: float) -> dict[str, Path]:
    """Write a preview of every clip; `fps` is that of clips that have none (images). Collective.

    Returns:
        Video files by caption; none if it was broken off.
    """

    def write(place: int, clip: Clip, frames_THWC: np.ndarray) -> None:
        about = {"prompt": clip.caption, "seed": clip.visit.seed >> 1, "clip": clip.key}
        save_sample(folder, f"{place:02d}", frames_THWC, clip.visit.fps or fps, about)

    if not previewer.each(clips, write):
        return {}
    return {clip.caption: folder / f"{n:02d}.mp4" for n, clip in enumerate(clips) if clip.visit.frames > 1}
