"""Sample videos from a trained model.

    python -m sora_train.sample run_dir=runs/demo prompt="a small red circle drifts left over a dark field"
        [out=clip.mp4] [image=first.png | video=beginning.mp4] [seconds=2] [height=32] [width=32] [seed=0] [count=1]
    python -m sora_train.sample run_dir=runs/demo [count=8]

Without a prompt, held-out captions are sampled into run_dir/samples/held_out. An image is the first frame; a video is
extended: what follows its end is generated. `seconds` is the length of the generated clip. Beside each video stand a
contact sheet (PNG) and what it was made from (JSON).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from omegaconf import MISSING
from PIL import Image

from sora_train.assemble import Shards
from sora_train.cli import InputError, options, run
from sora_train.config import Config, load
from sora_train.cost import geometry
from sora_train.data.plan import Position
from sora_train.data.transforms import to_video
from sora_train.flow.sampling import Request
from sora_train.generation import Sampler, load_sampler, request_for, save_sample
from sora_train.media import read_mp4

_HELD_OUT = 8  # captions sampled when none is given


@dataclass
class Options:
    """Command-line options."""

    run_dir: str = MISSING
    prompt: str | None = None
    out: str | None = None
    image: str | None = None
    video: str | None = None
    seconds: float | None = None  # of the whole clip; default: the longest trained clip
    height: int | None = None  # default: a square of the trained area
    width: int | None = None
    seed: int = 0
    count: int | None = None  # videos; default: one of a prompt, eight of held-out captions
    guidance: float | None = None
    steps: int | None = None


def main() -> int:
    """Sample what the options ask for, and say where it is."""
    o = options(Options, __doc__)
    config = load(o.run_dir)
    if o.guidance is not None:
        config.flow.guidance = o.guidance
    if o.steps is not None:
        config.flow.sampling_steps = o.steps
    sampler = load_sampler(config, o.run_dir, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if o.prompt is None:
        return _held_out(config, sampler, o)
    given = _given(config, o)
    size = _size(config, o, given)
    before, kept = _split(config, given, size)
    requests = [_request(config, sampler, o.prompt, size, o.seed + n, kept) for n in range(o.count or 1)]
    out = Path(o.out or Path(o.run_dir) / "samples" / "prompt" / f"{o.seed}.mp4")
    for n, (request, frames) in enumerate(zip(requests, sampler.in_batches(requests), strict=True)):
        name = out.stem if len(requests) == 1 else f"{out.stem}-{n}"
        about = {"prompt": o.prompt, "seed": request.seed, "run": o.run_dir, "image": o.image, "video": o.video}
        whole = np.concatenate((before, frames)) if before is not None else frames
        print(save_sample(out.parent, name, whole, config.data.fps, about))
    return 0


def _held_out(config: Config, sampler: Sampler, o: Options) -> int:
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
        path = save_sample(
            folder, f"{n:02d}", frames, config.data.fps, {"prompt": request.caption, "seed": request.seed}
        )
        print(f"{path}  {request.caption}")
    return 0


def _given(config: Config, o: Options) -> np.ndarray | None:
    """The frames of an image or video prompt, as they are."""
    path = o.image or o.video
    if path is None:
        return None
    if o.image and o.video:
        raise InputError("give image=... or video=..., not both")
    if not Path(path).is_file():
        raise InputError(f"there is no file {path}")
    if o.image:
        return np.asarray(Image.open(path).convert("RGB"))[None]
    frames, fps = read_mp4(path)
    return frames[:: max(1, round(fps / config.data.fps))]


def _size(config: Config, o: Options, given: np.ndarray | None) -> tuple[int, int, int]:
    """Frames, height and width of the clip: as asked, else the prompt's shape, else a square of the trained area."""
    grid = geometry(config)
    shape = given.shape[1:3] if given is not None else (o.height or 1, o.width or 1)
    if o.height and o.width:
        height, width = o.height, o.width
    else:
        scale = (config.data.max_pixels / (shape[0] * shape[1])) ** 0.5
        height, width = round(shape[0] * scale), round(shape[1] * scale)
    height, width = (max(1, round(side / grid.multiple)) * grid.multiple for side in (height, width))
    frames = config.data.max_frames if o.seconds is None else max(1, round(o.seconds * config.data.fps))
    return 1 + (frames - 1) // grid.temporal_stride * grid.temporal_stride, height, width


def _split(
    config: Config, given: np.ndarray | None, size: tuple[int, int, int]
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """The prompt's frames at the clip's size: those that come before the clip, and those at its beginning.

    An image is the first frame. Of a video, the end (up to half a clip) is the beginning of what is generated.
    """
    if given is None:
        return None, None
    stride = config.vae.temporal_stride
    resized = np.stack(
        [np.asarray(Image.fromarray(f).resize((size[2], size[1]), Image.Resampling.BICUBIC)) for f in given]
    )
    kept = 1 + (min(len(given), (size[0] + 1) // 2) - 1) // stride * stride
    return resized[: len(given) - kept], resized[len(given) - kept :]


def _request(
    config: Config, sampler: Sampler, prompt: str, size: tuple[int, int, int], seed: int, given: np.ndarray | None
) -> Request:
    request = request_for(config, prompt, size, seed)
    if given is None:
        return request
    latents = sampler.vae.encode(to_video(given).transpose(0, 1).unsqueeze(0))[0]
    return Request(request.caption, request.grid, seed, latents)


if __name__ == "__main__":
    run(main)
