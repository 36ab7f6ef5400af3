"""Samples a model for an evaluation and computes the metrics of the samples, unit by unit.

A unit is a fixed number of consecutive clips that are sampled together. Its figures don't depend on the rank that
computes them and are stored in a file per unit: the ranks divide the units, and an evaluation that was killed continues
with the missing ones.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch.distributed as dist
from rich.progress import track

from sora_train.core.cli import InputError
from sora_train.core.pixels import to_video
from sora_train.core.world import World
from sora_train.encoding.vae import FrozenVae
from sora_train.evaluation.completion import standing_still
from sora_train.evaluation.results import REAL, SAMPLES, STILL, THROUGH_VAE, Judged, Judges
from sora_train.generation.cases import Case, Task, request_of
from sora_train.generation.output import save_sample
from sora_train.generation.safeguards import NO_SAFEGUARDS, Safeguards
from sora_train.generation.sampler import Sampler

UNIT = 16  # clips


@dataclass(frozen=True)
class Evaluator:
    """Samples with the model of a checkpoint and computes the metrics, for this rank's share of the units."""

    sampler: Sampler
    checkpoint: str
    judges: Judges
    world: World
    safeguards: Safeguards = NO_SAFEGUARDS

    def evaluate(self, clips: Iterable[Case], task: Task, folder: Path) -> dict[str, list[Judged]]:
        """Compute the figures of every clip; returns them by column, such as `samples` or `real videos`.

        Args:
            clips: The cases, the same on every rank.
            task: Name and number of clips of the evaluation.
            folder: Stores a file per finished unit. It must belong to this evaluation alone.

        Raises:
            InputError: There is no clip.
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
        videos = {SAMPLES: self.sampler.in_batches([request_of(self.sampler.config, vae, case) for case in unit])}
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
            folder = Path(self.sampler.config.run_dir) / "samples" / task.name
            self._show(folder, place, case, made, columns[SAMPLES][place % UNIT])
        return columns

    def _show(self, folder: Path, place: int, case: Case, made_THWC: np.ndarray, judged: Judged) -> None:
        """Write a sample to a file. For a completed clip, the real clip is shown below it."""
        about: dict[str, object] = {"prompt": case.sample.caption, "seed": case.seed, "figures": judged.figures}
        if case.sample.part is not None:
            about |= {"given_frames": case.sample.part.given(len(made_THWC))}
            made_THWC = made_THWC if case.frames_THWC is None else np.concatenate((made_THWC, case.frames_THWC), axis=1)
        save_sample(folder, f"{place:04d}", made_THWC, case.sample.fps, about, self.safeguards)


def through_vae(vae: FrozenVae, frames_THWC: np.ndarray) -> np.ndarray:
    """Encode and decode frames `(T, H, W, 3)` uint8: the upper bound for a model on this VAE's latents."""
    return vae.decode(vae.encode(to_video(frames_THWC).transpose(0, 1).unsqueeze(0))[0])


def _write(path: Path, columns: Mapping[str, Sequence[Judged]]) -> None:
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps({column: [asdict(v) for v in videos] for column, videos in columns.items()}))
    temporary.replace(path)


def _wait_for_all(world: World) -> None:
    """Wait until every rank has called this, so that all units are written."""
    if world.size == 1:
        return
    dist.init_process_group("gloo", rank=world.rank, world_size=world.size)
    dist.barrier()
    dist.destroy_process_group()
