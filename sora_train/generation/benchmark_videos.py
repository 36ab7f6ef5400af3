"""Writes the videos of external benchmarks. Existing videos are kept, and the ranks share the others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from rich.progress import track

from sora_train.config.cost import geometry
from sora_train.config.schema import Config
from sora_train.core.cli import InputError
from sora_train.core.media import write_mp4
from sora_train.core.world import World
from sora_train.data.read.pool import Pool
from sora_train.evaluation.layouts import PHYSICS_SECONDS, Wanted
from sora_train.evaluation.results import write_json
from sora_train.generation.given import Given
from sora_train.generation.long_video import in_pieces
from sora_train.generation.requests import Prompt, Shot, clip_size
from sora_train.generation.safeguards import NO_SAFEGUARDS, Safeguards
from sora_train.generation.sampler import Sampler
from sora_train.generation.video import Video

_OVERLAP = 2  # latent frames that a piece of a long video shares with the one before


@dataclass(frozen=True)
class Output:
    """Settings of a benchmark's videos and their folder.

    `seconds` is the length of each video (None: that of the longest trained clip). `images` is a folder of first
    frames; a video's is found by the first four characters of the video's name, as in Physics-IQ.
    """

    folder: Path
    seed: int = 0
    seconds: float | None = None
    images: str | None = None


def write_videos(
    sampler: Sampler, every: Sequence[Wanted], to: Output, world: World, safeguards: Safeguards = NO_SAFEGUARDS
) -> None:
    """Sample the videos of `every` that don't exist yet. A video's seed is the output's plus its index in the list.

    Raises InputError if the length is not a whole number of frames, or a first frame is missing.
    """
    config = sampler.config
    frames = None if to.seconds is None else _frames(config, to.seconds)
    missing = [(n, one) for n, one in enumerate(every) if n % world.size == world.rank]

    def write(path: Path, video: Video) -> None:
        write_mp4(path, video, config.data.made_fps, metadata={"comment": "AI-generated video (sora_train)"})

    missing = [(n, one) for n, one in missing if not (to.folder / one.file).is_file()]
    with Pool.of(config.data) as pool:
        for place, one in track(missing, description=f"sampling into {to.folder}", disable=not world.is_main):
            given = None if to.images is None else _image(config, to.images, one, pool)
            video = _video(sampler, one.prompt, frames, to.seed + place, given)
            path = to.folder / one.file
            path.parent.mkdir(parents=True, exist_ok=True)
            about = {"prompt": one.prompt, "seed": to.seed + place, "file": one.file}
            safeguards.write(path, video, write, about)
    if world.is_main:
        seeds = {one.file: to.seed + n for n, one in enumerate(every)}
        write_json(to.folder / "seeds.json", {"run": config.run_dir, "seeds": seeds})


def _frames(config: Config, seconds: float) -> int:
    frames = seconds * config.data.made_fps
    if not math.isclose(frames, round(frames)):
        raise InputError(f"{seconds:g} s at data.fps={config.data.made_fps:g} are no whole number of frames")
    return round(frames)


def _video(sampler: Sampler, prompt: str, frames: int | None, seed: int, given: Given | None) -> np.ndarray:
    """Generate a video of `frames` frames (None: the trained length), in pieces if it is longer than a trained clip.

    It is generated with the next number of frames that the VAE's stride allows, and cut. A given first frame is the
    first frame of the video.
    """
    config = sampler.config
    grid, most = geometry(config), config.data.max_frames
    count = frames or most
    whole = 1 + -(-(count - 1) // grid.temporal_stride) * grid.temporal_stride
    size = clip_size(config, None if given is None else (given.height, given.width), None, None, None)
    before = None if given is None else given.decoded(0, given.frames, size[1:])
    asked = Prompt([Shot(float("inf"), prompt)], before)
    if whole <= most:
        return sampler.videos([asked.request(config, sampler.vae, (whole, *size[1:]), seed)])[0][:count]
    pieces = in_pieces(config, sampler, asked, (most, *size[1:]), whole, seed, overlap=_OVERLAP, loop=False)
    made = np.concatenate(list(islice(pieces, whole)))
    return made[:count] if asked.before is None else np.concatenate((asked.before, made))[:count]


def _image(config: Config, folder: str, one: Wanted, pool: Pool) -> Given:
    number = Path(one.file).name[:4]
    found = sorted(Path(folder).glob(f"{number}*"))
    if len(found) != 1:
        raise InputError(
            f"images={folder} needs one file that begins with {number}, for {one.file}; it has {len(found)}"
        )
    return Given(str(found[0]), config.data.made_fps, config.data.fit, pool)


def seconds_of(form: str, seconds: float | None) -> float | None:
    """Length of a benchmark's videos in seconds; None: that of the longest trained clip. Physics-IQ allows only one."""
    if form == "physics_iq":
        return PHYSICS_SECONDS
    return seconds or (PHYSICS_SECONDS if form == "vbench_long" else None)
