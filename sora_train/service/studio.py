"""Maker that samples jobs with a model. Its videos are guarded, marked and signed like those of `sample`."""

from __future__ import annotations

import copy
import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from sora_train.config.cost import geometry
from sora_train.core.cli import InputError
from sora_train.data.read.pool import Pool
from sora_train.generation.options import Job as SampleJob
from sora_train.generation.output import is_there, save
from sora_train.generation.requests import Prompt
from sora_train.generation.safeguards import Safeguards
from sora_train.generation.sampler import Sampler
from sora_train.generation.samples import Model, Sample, check_prompt, made, made_with, prepared
from sora_train.generation.video import Video, pieces_of
from sora_train.service.database import Job
from sora_train.service.worker import Cancelled, Watch

_log = logging.getLogger(__name__)
_EVALUATIONS = {"heun": 2}  # evaluations of the network per step, by solver; else 1
_PACKS = 4  # most tokens that are sampled together, in training packs, as in an evaluation


class Studio:
    """Makes the videos of jobs with one model, which is loaded once."""

    def __init__(self, model: Model, safeguards: Safeguards, folder: Path, most_seconds: float) -> None:
        self._model, self._safeguards, self._folder = model, safeguards, folder
        self._most_seconds = most_seconds
        self._pool = Pool.of(replace(model.config.data, workers=1))
        self._sampler: Sampler | None = None

    def open(self) -> None:
        """Load the model, so that the first job needn't wait for it."""
        self._sampler = self._model.open()

    def close(self) -> None:
        """End the decoder's process."""
        self._pool.close()

    def together(self, jobs: Sequence[Job], next: Job) -> bool:
        """Tell whether all jobs are single clips from text, and fit into `_PACKS` training packs together."""
        every = [*jobs, next]
        if any(json.loads(job.request)[name] for job in every for name in ("image", "video")):
            return False
        config = self._model.config
        if any(job.seconds * config.data.made_fps > config.data.max_frames + 0.5 for job in every):
            return False
        tokens = sum(math.prod(geometry(config).grid(*self._size(job))) for job in every)
        return tokens <= _PACKS * config.data.max_tokens

    def make(self, watches: Sequence[Watch]) -> dict[str, str | Exception]:
        """Make the videos of jobs. Returns by job id the name of its video, or the exception that prevented it."""
        outcomes: dict[str, str | Exception] = {}
        ready: list[tuple[Watch, Sample]] = []
        for watch in watches:
            try:
                sample = self._prepared(watch.job)
                about = self._about(sample)
                if is_there(sample.target, about):  # made before the service was killed
                    outcomes[watch.job.id] = sample.target.path.name
                    continue
                check_prompt(self._model.world, sample, self._safeguards)
                ready.append((watch, sample))
            except InputError as error:
                outcomes[watch.job.id] = error
        if ready:
            outcomes |= self._made(ready)
        return outcomes

    def forget(self, job: Job) -> None:
        """Remove a video, its sheet and its JSON."""
        for file in (self._folder / "outputs").glob(f"{job.id}*"):
            file.unlink()

    def _prepared(self, job: Job) -> Sample:
        """Prepare the sample of a job. Raises InputError, whose message doesn't contain the uploads' paths."""
        wish = json.loads(job.request)
        given = {name: str(self._folder / "uploads" / wish[name]) for name in ("image", "video") if wish[name]}
        o = replace(
            self._model.options, prompt=wish["prompt"], seed=wish["seed"], seconds=job.seconds,
            image=given.get("image"), video=given.get("video"),
        )  # fmt: skip
        try:
            sample = prepared(self._model.config, o, SampleJob(o, self._folder / "outputs" / job.id), self._pool)
        except InputError as error:
            text = str(error)
            for path in given.values():
                text = text.replace(path, "the upload")
            raise InputError(text) from error
        shown = sum(one.frames for one in sample.given.values())
        if shown > self._most_seconds * self._model.config.data.made_fps:
            raise InputError(f"the upload is longer than {self._most_seconds:g} seconds")
        return sample

    def _size(self, job: Job) -> tuple[int, int, int]:
        config = self._model.config
        side = round(config.data.max_pixels**0.5)
        return max(1, round(job.seconds * config.data.made_fps)), side, side

    def _about(self, sample: Sample) -> dict[str, Any]:
        about = sample.about(self._model.weights)
        return about | self._safeguards.about(about)

    def _made(self, ready: Sequence[tuple[Watch, Sample]]) -> dict[str, str | Exception]:
        sampler = self._sampler = self._sampler or self._model.open()
        watched = copy.copy(sampler)
        progress = _progress([watch for watch, _ in ready], [sample for _, sample in ready])
        watched.network = _Watched(sampler.network, progress)  # type: ignore[assignment]
        try:
            if len(ready) > 1:
                videos: list[Video] = [*_in_one_pack(watched, [sample for _, sample in ready])]
            else:
                videos = [made(watched, ready[0][1])]
        except Cancelled as error:
            return {watch.job.id: error for watch, _ in ready}
        outcomes: dict[str, str | Exception] = {}
        for (watch, sample), video in zip(ready, videos, strict=True):
            outcomes[watch.job.id] = self._kept(watch, sample, video, sampler)
        return outcomes

    def _kept(self, watch: Watch, sample: Sample, video: Video, sampler: Sampler) -> str | Exception:
        """Write one video. Returns the file's name, or the exception that prevented it."""
        try:
            watch.progress(0.99)  # raises Cancelled: then nothing is written
            fps = sample.config.data.made_fps
            about = self._about(sample) | made_with(sampler)
            pieces = video if isinstance(video, np.ndarray) else pieces_of(video)
            return save(sample.target, pieces, fps, about, self._safeguards).name
        except (InputError, Cancelled) as error:
            return error
        except Exception as error:
            _log.exception("job %s failed", watch.job.id)
            return error


class _Watched:
    """Wrapper of a network that calls `count` at every evaluation."""

    def __init__(self, network: Any, count: Callable[[], None]) -> None:
        self._network, self._count = network, count

    def __call__(self, pack: Any) -> Any:
        self._count()
        return self._network(pack)


def _progress(watches: Sequence[Watch], samples: Sequence[Sample]) -> Callable[[], None]:
    """Build a function to call at every evaluation of the network, which reports the progress of all jobs.

    It raises Cancelled when every job is cancelled, or the service stops.
    """
    config, done = samples[0].config, 0
    pieces = max(1, math.ceil(samples[0].size[0] / config.data.max_frames)) if samples[0].in_pieces else 1
    expected = config.flow.sampling_steps * _EVALUATIONS.get(config.flow.solver, 1) * pieces

    def count() -> None:
        """Count an evaluation of the network, and report the share of evaluations done."""
        nonlocal done
        done += 1
        waiting = 0
        for watch in watches:
            try:
                watch.progress(min(0.98, done / (expected + 1)))
                waiting += 1
            except Cancelled:
                continue
        if not waiting:
            raise Cancelled

    return count


def _in_one_pack(sampler: Sampler, samples: Sequence[Sample]) -> list[np.ndarray]:
    """Sample single clips together: clips of different lengths share packs without padding. Returns their frames."""
    requests = []
    for sample in samples:
        prompt = Prompt(sample.shots)
        requests.append(prompt.request(sample.config, sampler.vae, sample.size, sample.options.seed))
    return sampler.videos(requests)
