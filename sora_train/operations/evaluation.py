"""Evaluation of a run while it trains: metrics of samples for a small, fixed set of held-out clips."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.distributed as dist

from sora_train.core.batch import Clip
from sora_train.core.cli import InputError, nearest
from sora_train.data.order.plan import Plan
from sora_train.evaluation.metric import Sample
from sora_train.evaluation.results import SAMPLES, Judged, Judges, Row, summarise
from sora_train.operations.held_out import PreviewClips, Previewer
from sora_train.training.parts import Marks


@dataclass(frozen=True)
class RunEvaluation:
    """Computes metrics of samples of a run's model.

    Args:
        clips: The clips to sample, by their captions, sizes and seeds.
        plan: The plan of the held-out shards, which has the fields of their jsons.
        judges: The metrics.
        best: Figure by which checkpoints are compared; None: no figure.
    """

    clips: PreviewClips
    plan: Plan
    judges: Judges
    best: str | None

    def marks(self, previewer: Previewer) -> Marks:
        """Sample every clip and compute the metrics. Collective; the same on every rank, and empty if interrupted.

        Raises InputError if the held-out shards contain no video, or no metric computes the figure `best`.
        """
        clips, mine = self.clips.get(), list[tuple[int, Judged]]()
        if not clips:
            raise InputError("logging.evaluate_every: data.validation holds no video; name other shards there")

        def judge(place: int, clip: Clip, frames_THWC: np.ndarray) -> None:
            sample = Sample(clip.key, clip.caption, clip.visit.fps, self._fields(clip))
            mine.append((place, self.judges.judge(frames_THWC, _pixels(clip), sample)))

        if not previewer.each(clips, judge):
            return Marks({}, None)
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        judged = sorted((one for share in everyone for one in share), key=lambda one: one[0])
        rows = summarise(self.judges.metrics, {SAMPLES: [video for _, video in judged]})
        return Marks({row.name: row.cells[SAMPLES].value for row in rows}, self._score(rows))

    def _fields(self, clip: Clip) -> Mapping[str, Any]:
        return self.plan.index.fields(clip.visit.sample)

    def _score(self, rows: list[Row]) -> float | None:
        if self.best is None:
            return None
        found = {row.name: row for row in rows if row.better is not None}
        if self.best not in found:
            raise InputError(f"checkpoint.best={self.best}; {nearest(self.best, list(found))}")
        value = found[self.best].cells[SAMPLES].value
        return value if found[self.best].better == "up" else -value


def _pixels(clip: Clip) -> np.ndarray | None:
    """The real frames; None for a clip that was encoded before training."""
    if clip.latents_CTHW is not None:
        return None
    return np.ascontiguousarray(clip.video_TCHW.permute(0, 2, 3, 1).numpy())
