"""Sample videos from a trained model.

    python -m sora_train.sample run_dir=runs/demo prompt="a small red ring drifts left over a dark field"
        [out=clip.mp4] [image=first.png | video=before.mp4] [end_image=last.png | end_video=after.mp4]
        [strength=0.6] [seconds=2] [whole=true] [loop=true] [overlap=2] [height=32] [width=32] [seed=0] [count=1]
        [rope_scaling=ntk rope_factors=[2,1,1]]
    python -m sora_train.sample run_dir=runs/demo prompt="[{seconds: 1, caption: a red ring}, {...}]"
    python -m sora_train.sample run_dir=runs/demo [count=8]

Without a prompt, held-out captions are sampled into run_dir/samples/held_out. `image` or `video` is the beginning,
`end_image` or `end_video` the end, and both together are joined; with `strength` below 1, `video` is made anew instead.
Videos longer than the trained length are made piece by piece, or at once with `whole=true`. A contact sheet (PNG) and
the settings (JSON) are written beside each video. Under torchrun all ranks share the tokens of each clip (sequence
parallelism), for clips that are too long for one. See docs/sampling.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import MISSING

from sora_train.config.load import load
from sora_train.config.rules import check
from sora_train.config.schema import Config
from sora_train.core.cli import InputError, options, run
from sora_train.core.world import World, from_environment
from sora_train.data.order.plan import Position
from sora_train.data.shards import Shards
from sora_train.generation.long_video import in_pieces
from sora_train.generation.requests import (
    Prompt,
    Shot,
    Size,
    around,
    check_strength,
    clip_size,
    fits,
    read_frames,
    read_shots,
    resized,
)
from sora_train.generation.sampler import Sampler, request_for, save_sample
from sora_train.models.layers import ulysses
from sora_train.operations.trained import load_sampler

Video = np.ndarray | Iterable[np.ndarray]  # whole, or in pieces
_FILES = ("image", "video", "end_image", "end_video")
_HELD_OUT = 8  # captions sampled when none is given


@dataclass
class Options:
    """Command-line options."""

    run_dir: str = MISSING
    prompt: Any = None  # a caption, or a list of {seconds, caption}
    out: str | None = None
    image: str | None = None
    video: str | None = None
    end_image: str | None = None
    end_video: str | None = None
    strength: float = 1.0  # below 1: noise level from which `video` is made anew
    loop: bool = False  # make the end continue into the beginning
    whole: bool = False  # attend over the whole length at once, however long
    overlap: int = 2  # latent frames that a piece shares with the previous one
    seconds: float | None = None  # of the whole clip; default: the longest trained clip
    height: int | None = None  # default: a square of the trained area
    width: int | None = None
    seed: int = 0
    count: int | None = None  # videos; default: one of a prompt, eight of held-out captions
    guidance: float | None = None
    steps: int | None = None
    solver: str | None = None
    rope_scaling: str | None = None
    rope_factors: list[float] | None = None  # of time, height, width


def main() -> int:
    """Sample videos as the options say, and print their paths."""
    o = options(Options, __doc__)
    config = load(o.run_dir)
    for key, value in (("guidance", o.guidance), ("sampling_steps", o.steps), ("solver", o.solver)):
        if value is not None:
            setattr(config.flow, key, value)
    _stretch(config, o)
    check(config)
    shots, given = _read(config, o)
    world = _sharing(config)
    sampler = _sampler(config, o.run_dir, world)
    if not shots:
        return _held_out(config, sampler, o, world)
    ends = [frames for frames in given.values() if frames is not None]
    told = sum(shot.seconds for shot in shots)
    asked = o.seconds or (told if told < float("inf") else None)
    size = clip_size(config, ends[0] if ends else None, o.height, o.width, asked)
    given = {name: None if frames is None else resized(frames, size) for name, frames in given.items()}
    start = None if given["start"] is None else fits(given["start"], size)
    prompt = Prompt(shots, given["before"], given["after"], start, o.strength)
    out = Path(o.out or Path(o.run_dir) / "samples" / "prompt" / f"{o.seed}.mp4")
    about = {"prompt": o.prompt, "run": o.run_dir, "strength": o.strength, "loop": o.loop} | {
        key: getattr(o, key) for key in _FILES
    }
    longer = o.loop or (size[0] > config.data.max_frames and not o.whole)
    if longer and (prompt.after is not None or prompt.start is not None):
        raise InputError("a loop, or a video made piece by piece, can't end in what is given; try whole=true")
    if size[0] == 1 and (prompt.before is not None or prompt.after is not None):
        raise InputError("one frame has no room beside what is given; give more seconds")
    videos = (_long if longer else _short)(config, sampler, prompt, size, o)
    for n, video in enumerate(videos):
        name = out.stem if o.count in (None, 1) else f"{out.stem}-{n}"
        _keep(world, out.parent, name, video, config.data.fps, about | {"seed": o.seed + n})
    return 0


def _sharing(config: Config) -> World:
    """World in which all ranks share the tokens of a clip. Raises InputError if they don't divide the heads."""
    world = from_environment()
    if config.model.heads % world.size:
        raise InputError(f"{world.size} ranks can't share {config.model.heads} heads (model.heads); start fewer")
    return world.with_sequence(world.size)


def _sampler(config: Config, run_dir: str, world: World) -> Sampler:
    if world.size == 1:
        return load_sampler(config, run_dir, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    from sora_train.training.engine.zero import connect  # deepspeed takes seconds to import

    sampler = load_sampler(config, run_dir, connect(world))
    others = ulysses.Neighbours(ulysses.sequence_group(world))
    network: Any = sampler.network
    network.split_sequence(others)
    return sampler


def _keep(
    world: World, folder: Path, name: str, video: Video, fps: float, about: dict[str, object], note: str = ""
) -> None:
    """Write a video and print its path, on the main rank. Other ranks consume the pieces, whose sampling is collective.

    Every rank has the video; `note` is printed behind the path.
    """
    if world.is_main:
        print(f"{save_sample(folder, name, video, fps, about)}  {note}".rstrip())
    elif not isinstance(video, np.ndarray):
        for _ in video:
            pass


def _stretch(config: Config, o: Options) -> None:
    """Set RoPE scaling from the options. Raises InputError if the model family has none."""
    for key in ("rope_scaling", "rope_factors"):
        if getattr(o, key) is not None:
            if not hasattr(config.model, key):
                raise InputError(f"{key}: models of the family {config.model.family} have no such key")
            setattr(config.model, key, getattr(o, key))


def _read(config: Config, o: Options) -> tuple[list[Shot], dict[str, np.ndarray | None]]:
    """Read captions and frames of the options, before the model is loaded."""
    for one, other in (("image", "video"), ("end_image", "end_video")):
        if getattr(o, one) and getattr(o, other):
            raise InputError(f"give {one}=... or {other}=..., not both")
    check_strength(o.strength)
    if o.strength < 1.0 and not o.video:
        raise InputError("strength below 1 makes a video anew; give video=...")
    if o.overlap < 1:
        raise InputError(f"overlap={o.overlap} latent frames; must be above 0")
    before = read_frames(o.image or o.video, config.data.fps)
    after = read_frames(o.end_image or o.end_video, config.data.fps)
    anew = o.strength < 1.0
    frames = {"before": None if anew else before, "after": after, "start": before if anew else None}
    if o.prompt is None and any(value is not None for value in frames.values()):
        raise InputError('what is given needs a prompt="..." too')
    return ([] if o.prompt is None else read_shots(o.prompt)), frames


def _short(config: Config, sampler: Sampler, prompt: Prompt, size: Size, o: Options) -> Iterator[Video]:
    """Yield videos of one clip each, joined with the given videos before and after it."""
    requests = [prompt.request(config, sampler.vae, size, o.seed + n) for n in range(o.count or 1)]
    for request, video in zip(requests, sampler.in_batches(requests), strict=True):
        yield around(config, prompt, request, video)


def _long(config: Config, sampler: Sampler, prompt: Prompt, size: Size, o: Options) -> Iterator[Video]:
    """Yield long videos, whose pieces are written as they are sampled."""
    piece = (min(size[0], config.data.max_frames), *size[1:])
    for n in range(o.count or 1):
        made = in_pieces(config, sampler, prompt, piece, size[0], o.seed + n, o.overlap, o.loop)
        yield made if prompt.before is None else chain([prompt.before], made)


def _held_out(config: Config, sampler: Sampler, o: Options, world: World) -> int:
    plan = Shards(config).held_out(config)
    if plan is None:
        raise InputError('the run has no held-out shards; give prompt="..."')
    every = (visit for _, slots in plan.from_position(Position()) for slot in slots for visit in slot)
    visits = list(islice((visit for visit in every if visit.frames > 1), o.count or _HELD_OUT))
    captions = [plan.index.captions(visit.sample)[0][0] for visit in visits]
    requests = [
        request_for(config, caption, visit.size, o.seed + n)
        for n, (caption, visit) in enumerate(zip(captions, visits, strict=True))
    ]
    folder = Path(o.run_dir) / "samples" / "held_out"
    for n, (request, frames) in enumerate(zip(requests, sampler.in_batches(requests), strict=True)):
        about: dict[str, object] = {"prompt": request.caption, "seed": request.seed}
        _keep(world, folder, f"{n:02d}", frames, config.data.fps, about, request.caption)
    return 0


if __name__ == "__main__":
    run(main)
