"""Generates the samples of jobs and writes their files.

Each sample is generated separately, so that its JSON file is enough to generate it again.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from sora_train.config.cost import geometry
from sora_train.config.rules import check
from sora_train.config.schema import Config
from sora_train.core.cli import InputError
from sora_train.core.world import World
from sora_train.data.read.pool import Pool
from sora_train.encoding.captions import count_tokens
from sora_train.generation.given import Given
from sora_train.generation.long_video import check_overlap, in_pieces
from sora_train.generation.memory import has_room, remembers
from sora_train.generation.options import FILES, Job, Options, Recorded, record
from sora_train.generation.output import Target, is_there, save, target_of
from sora_train.generation.requests import Prompt, Shot, Size, clip_size, fits, inside, read_shots
from sora_train.generation.safeguards import NO_SAFEGUARDS, Refused, Safeguards
from sora_train.generation.sampler import Sampler
from sora_train.generation.video import Video, pieces_of


@dataclass
class Sample:
    """One sample ready to be generated: its configuration, size, captions, given images and videos, and target."""

    config: Config
    options: Options
    size: Size
    shots: list[Shot]
    given: dict[str, Given]  # by the option that named it
    target: Target
    note: str

    @property
    def in_pieces(self) -> bool:
        """True if the sample is generated in pieces: it is longer than a clip (without `whole`), or a loop."""
        o = self.options
        return o.loop or (self.size[0] > self.config.data.max_frames and not o.whole)

    @property
    def piece(self) -> int:
        """Latent frames of a piece."""
        return geometry(self.config).grid(min(self.size[0], self.config.data.max_frames), *self.sides)[0]

    @property
    def memory(self) -> bool:
        """True if its pieces see an earlier frame: the option; by default, if the run trained it and there is room."""
        o = self.options
        if o.memory is not None:
            return o.memory
        return not o.loop and remembers(self.config) and has_room(self.piece, o.overlap)

    @property
    def sides(self) -> tuple[int, int]:
        """Height and width."""
        return self.size[1], self.size[2]

    def about(self, weights: str) -> dict[str, Any]:
        """Contents of the JSON file beside the sample: everything needed to generate it again."""
        o, flow = self.options, self.config.flow
        whole = replace(
            o, seconds=self.size[0] / self.config.data.made_fps, height=self.size[1], width=self.size[2],
            fps=o.fps or self.config.data.made_fps, format=self.target.format, guidance=flow.guidance,
            guidance_interval=list(flow.guidance_interval), guidance_rescale=flow.guidance_rescale,
            steps=flow.sampling_steps, solver=flow.solver, shift=flow.shift,
            memory=self.memory if self.in_pieces else None,
        )  # fmt: skip
        return {
            "prompt": o.prompt, "seed": o.seed, "file": self.target.path.name, "frames": self.size[0],
            "options": record(whole), "weights": weights,
            "given": {name: given.sha256() for name, given in self.given.items()},
        }  # fmt: skip


class Model(Protocol):
    """The model that generates the samples (`operations/source.py`)."""

    config: Config
    options: Options  # of the command, with the exact checkpoint and adapters
    weights: str  # hashes of all trained weights
    world: World

    def open(self) -> Sampler:
        """Load the model, ready to sample."""


def make_all(
    model: Model, jobs: Sequence[Job], recorded: Recorded | None, safeguards: Safeguards = NO_SAFEGUARDS
) -> None:
    """Generate the samples of the jobs, one after the other, and print the path of each.

    All jobs are checked before the first one is generated. If there are several, existing samples are skipped.

    Raises:
        InputError: A job is wrong, or the safeguards refused samples (raised after all others were generated).
    """
    o, weights = model.options, model.weights
    if recorded is not None and recorded.weights not in ("", weights):
        raise InputError(f"{recorded.path} was made from other weights than {o.run_dir} holds; give run_dir=... anew")
    with Pool.of(replace(model.config.data, workers=1)) as pool:
        samples = []
        for job in jobs:
            its = replace(job.options, checkpoint=o.checkpoint, lora=o.lora)
            samples.append(prepared(model.config, its, job, pool))
            safeguards.check_format(samples[-1].target.format)
        sampler: Sampler | None = None
        refused: list[str] = []
        for sample in samples:
            about = sample.about(weights)
            _check_given(about["given"], recorded)
            about |= safeguards.about(about)
            if len(samples) > 1 and is_there(sample.target, about):
                _say(model.world, f"{sample.target.path}  there already")
                continue
            if model.world.size > 1:
                sampler = sampler or model.open()  # connects the ranks, which `check_prompt` needs
            try:
                check_prompt(model.world, sample, safeguards)
                sampler = sampler or model.open()
                _keep(model.world, sample, made(sampler, sample), about | made_with(sampler), safeguards)
            except Refused as error:
                refused.append(f"{sample.target.path}: {error}")
                print(f"refused: {refused[-1]}", file=sys.stderr, flush=True)
    if refused:
        if sampler is not None and model.world.size > 1:
            torch.distributed.barrier()  # a launcher kills all ranks when one fails: let the last file be written first
        raise InputError(f"{len(refused)} of {len(samples)} refused; {refused[0]}")


def made_with(sampler: Sampler) -> dict[str, Any]:
    """An entry of a sample's JSON: the versions and the type of device that generated it."""
    its = {"sora_train": version("sora_train"), "torch": torch.__version__, "device": sampler.device.type}
    return {"made_with": its}


def check_prompt(world: World, sample: Sample, safeguards: Safeguards) -> None:
    """Check captions and given files by the safeguards, on the main rank, which broadcasts the result.

    Raises Refused, on all ranks.
    """
    refusal: Refused | None = None
    if world.is_main:
        try:
            shown = [given.glimpse(sample.sides) for given in sample.given.values()]
            texts = [shot.caption for shot in sample.shots]
            if sample.options.expanded_from is not None:
                texts.append(sample.options.expanded_from)
            safeguards.check_prompt(texts, shown)
        except Refused as error:
            refusal = error
    if world.size > 1:
        box = [None if refusal is None else (str(refusal), refusal.category)]
        torch.distributed.broadcast_object_list(box, src=0)
        refusal = None if box[0] is None else Refused(*box[0])
    if refusal is not None:
        raise refusal


def made(sampler: Sampler, sample: Sample) -> Video:
    """Generate the frames of a sample: one array, or an iterator that generates a long video in pieces."""
    sampler = copy.copy(sampler)
    sampler.config = config = sample.config
    o, size, sides = sample.options, sample.size, sample.sides
    before, after, start = _ends(sample)
    prompt = Prompt(
        sample.shots,
        None if before is None else before.decoded(max(0, before.frames - size[0]), min(size[0], before.frames), sides),
        None if after is None else after.decoded(0, min(size[0], after.frames), sides),
        None if start is None else fits(start.decoded(0, min(size[0], start.frames), sides), size),
        o.strength,
        o.negative,
        before.decoded(0, min(before.frames, 1 + o.overlap * config.vae.temporal_stride), sides)
        if before is not None and o.loop
        else None,
    )
    if sample.in_pieces:
        piece = (min(size[0], config.data.max_frames), *sides)
        pieces = in_pieces(
            config, sampler, prompt, piece, size[0], o.seed, overlap=o.overlap, loop=o.loop, memory=sample.memory
        )
        return pieces if before is None else chain(before.pieces(0, before.frames, sides), pieces)
    request = prompt.request(config, sampler.vae, size, o.seed)
    (video,) = sampler.videos([request])
    if before is None and after is None:
        return video
    first, last = inside(config, prompt, request)
    earlier: Iterator[np.ndarray] = iter(()) if before is None else before.pieces(0, before.frames - first, sides)
    later: Iterator[np.ndarray] = iter(()) if after is None else after.pieces(last, after.frames, sides)
    return chain(earlier, [video], later)


def prepared(config: Config, o: Options, job: Job, pool: Pool) -> Sample:
    """Check a job's options, open its given files and choose size and target.

    Raises InputError if options can't be combined or a file can't be read.
    """
    for one, other in (("image", "video"), ("end_image", "end_video")):
        if getattr(o, one) and getattr(o, other):
            raise InputError(f"give {one}=... or {other}=..., not both")
    if o.strength < 1.0 and not o.video:
        raise InputError("strength below 1 makes a video anew; give video=...")
    config = _with_flow(config, o)
    shots = [Shot(float("inf"), o.prompt or "")] if o.shots is None else read_shots(o.shots)
    _say_what_is_cut(config, [shot.caption for shot in shots] + [o.negative])
    names = [name for name in FILES if getattr(o, name) is not None]
    given = {name: Given(getattr(o, name), config.data.made_fps, config.data.fit, pool) for name in names}
    shape = next(((g.height, g.width) for g in given.values()), None)
    told = sum(shot.seconds for shot in shots)
    size = clip_size(config, shape, o.height, o.width, o.seconds or (told if told < float("inf") else None))
    longest = size[0] + sum(g.frames for name, g in given.items() if name in ("image", "video"))
    target = target_of(job.place, o.format, longest if given else size[0], o.crf)
    sample = Sample(config, o, size, shots, given, target, job.note)
    before, after, start = _ends(sample)
    if sample.in_pieces and (after is not None or start is not None):
        raise InputError("a loop, or a video made piece by piece, can't end in what is given; try whole=true")
    if sample.in_pieces:
        if o.memory and o.loop:
            raise InputError("a loop is made without memory; leave memory=true out")
        check_overlap(sample.piece, o.overlap, memory=sample.memory)
    if size[0] == 1 and (before is not None or after is not None):
        raise InputError("one frame has no room beside what is given; give more seconds")
    return sample


def _with_flow(config: Config, o: Options) -> Config:
    """Apply the options of guidance and solver to a configuration. Raises InputError for an invalid combination."""
    chosen: dict[str, Any] = {
        "guidance": o.guidance, "guidance_interval": o.guidance_interval and tuple(o.guidance_interval),
        "guidance_rescale": o.guidance_rescale, "sampling_steps": o.steps, "solver": o.solver, "shift": o.shift,
    }  # fmt: skip
    flow = replace(config.flow, **{key: value for key, value in chosen.items() if value is not None})
    if o.negative and flow.guidance == 1.0:
        raise InputError("negative=... says nothing with guidance=1; give guidance=... above 1")
    changed = replace(config, flow=flow)
    check(changed)
    return changed


def _ends(sample: Sample) -> tuple[Given | None, Given | None, Given | None]:
    """Select the files given before and after the clip, and the video that it varies (`strength` below 1)."""
    found = sample.given
    first, last = found.get("image") or found.get("video"), found.get("end_image") or found.get("end_video")
    return (first, last, None) if sample.options.strength == 1.0 else (None, last, first)


def _check_given(given: dict[str, str], recorded: Recorded | None) -> None:
    if recorded is None:
        return
    for name, sha in recorded.given.items():
        if given.get(name) != sha:
            raise InputError(f"{recorded.path} was made from another {name} than is there now; give {name}=... anew")


def _say_what_is_cut(config: Config, captions: list[str]) -> None:
    """Warn of captions with more tokens than the run's own text encoder reads."""
    t = config.text_encoder
    if t.path is not None:
        return
    for caption, tokens in zip(captions, count_tokens(config, captions), strict=True):
        if tokens > t.max_tokens:
            text = f"a prompt of {tokens} tokens is cut at text_encoder.max_tokens={t.max_tokens}: {caption[:60]!r}..."
            print(f"warning: {text}", file=sys.stderr, flush=True)


def _keep(world: World, sample: Sample, video: Video, about: dict[str, Any], safeguards: Safeguards) -> None:
    """Write a video and print its path, on the main rank.

    The other ranks only iterate over its pieces, because all ranks generate each piece together.
    """
    pieces = video if isinstance(video, np.ndarray) else iter(video)
    try:
        if world.is_main:
            fps = sample.options.fps or sample.config.data.made_fps
            path: Path = save(sample.target, pieces, fps, about, safeguards)
            print(f"{path}  {sample.note}".rstrip(), flush=True)
    finally:
        if world.size > 1:
            for _ in pieces_of(pieces):  # the remaining pieces, which the other ranks generate together with this one
                pass


def _say(world: World, line: str) -> None:
    if world.is_main:
        print(line, flush=True)
