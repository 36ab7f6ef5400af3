"""Inputs of a clip: captions with times, given frames at either end, a video to start from; and the clip's size."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from sora_train.config.cost import geometry
from sora_train.config.schema import Config
from sora_train.core.cli import InputError
from sora_train.core.cost import Geometry
from sora_train.core.pixels import to_video
from sora_train.encoding.vae import FrozenVae
from sora_train.flow.ode import Request

Size = tuple[int, int, int]  # frames, height, width


@dataclass(frozen=True)
class Shot:
    """A caption and the number of seconds that it describes."""

    seconds: float
    caption: str


def read_shots(text: str) -> list[Shot]:
    """Shots from a JSON list of {"seconds": 2, "caption": "..."}. Raises InputError for anything else."""
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f'shots is not JSON ({error}); give [{{"seconds": 2, "caption": "..."}}, ...]') from error
    if not isinstance(entries, list) or not entries:
        raise InputError('shots must be a list with one shot or more: [{"seconds": 2, "caption": "..."}, ...]')
    shots = []
    for entry in entries:
        if not isinstance(entry, dict) or set(entry) != {"seconds", "caption"} or not isinstance(entry["caption"], str):
            raise InputError(f'shots: {json.dumps(entry)} is no shot; give {{"seconds": 2, "caption": "..."}}')
        seconds = entry["seconds"]
        is_number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool) and math.isfinite(seconds)
        if not is_number or seconds <= 0:
            raise InputError(f"shots: seconds={json.dumps(seconds)} must be a number above 0")
        shots.append(Shot(float(seconds), entry["caption"]))
    return shots


def clip_size(
    config: Config, given: tuple[int, int] | None, height: int | None, width: int | None, seconds: float | None
) -> Size:
    """Frames, height and width of a clip on the grid of the VAE and the patches.

    If only one side is given, the other follows from the shape of the given frames (height, width), else from
    `flow.sampling_aspect`. If neither is given, the area is the trained one.
    """
    grid = geometry(config)
    shape = given or config.flow.sampling_aspect
    if height is None and width is None:
        scale = (config.data.max_pixels / (shape[0] * shape[1])) ** 0.5
        sides = (shape[0] * scale, shape[1] * scale)
    else:
        sides = (height or _first_side(shape, width), width or _first_side(shape[::-1], height))
    rows, columns = (max(1, round(side / grid.multiple)) * grid.multiple for side in sides)
    if rows * columns > config.data.limits.pixels:
        raise InputError(f"a clip of {columns}x{rows} is above data.limits.pixels={config.data.limits.pixels}")
    frames = config.data.max_frames if seconds is None else max(1, round(seconds * config.data.made_fps))
    return 1 + (frames - 1) // grid.temporal_stride * grid.temporal_stride, rows, columns


def _first_side(shape: tuple[int, int], side: int | None) -> float:
    """The first side of a shape whose second side is `side`."""
    return shape[0] / shape[1] * (side or 0)


@dataclass
class Prompt:
    """One video to generate, with the frames that condition it, `(T, H, W, 3)` uint8 at the size of the video.

    `before` and `after` are given frames at its beginning and end. `start` is a video to vary, noised to `strength`.
    """

    shots: list[Shot]
    before: np.ndarray | None = None
    after: np.ndarray | None = None
    start: np.ndarray | None = None
    strength: float = 1.0
    negative: str = ""  # what guidance leads away from
    opening: np.ndarray | None = None  # the first of the frames given at the beginning, to which a loop leads back
    most: int | None = None  # most latent frames given at an end; None: half a clip, or a third if both ends are given

    def request(self, config: Config, vae: FrozenVae, size: Size, seed: int, first: int = 0) -> Request:
        """The request for a clip of `size` that begins at frame `first` of the video."""
        grid = geometry(config)
        frames = grid.grid(*size)[0]
        given = []
        both = self.before is not None and self.after is not None
        most = self.most or max(1, frames // 3 if both else frames // 2)
        if self.before is not None:
            given.append((0, encode(vae, tail(self.before, most, grid))))
        lead = None
        if self.after is not None:
            latents = encode_end(vae, self.after, most, grid)
            lead, latents = latents[:, :1], latents[:, 1:]
            given.append((frames - latents.shape[1], latents))
        start = None if self.start is None else encode(vae, self.start)
        shots = spans(self.shots, frames, first, grid.temporal_stride, config.data.made_fps)
        caption = shots[0][1]
        return Request(
            caption, grid.grid(*size), seed, tuple(given), start, self.strength, shots if len(shots) > 1 else (), lead,
            negative=self.negative,
        )  # fmt: skip


def spans(shots: Sequence[Shot], frames: int, first: int, stride: int, fps: float) -> tuple[tuple[int, str], ...]:
    """Compute which shots a clip shows that begins at frame `first` of the video.

    The last shot continues to the end of the video.

    Args:
        shots: Captions and seconds of the whole video.
        frames: Latent frames of the clip.
        first: Frame of the video at which the clip begins.
        stride: Frames per latent frame.
        fps: Frames per second.

    Returns:
        For each shown shot the number of latent frames that it conditions, and its caption.
    """
    ends = np.cumsum([shot.seconds for shot in shots])[:-1]
    at = [(first + max(0, 1 + (place - 1) * stride)) / fps for place in range(frames)]  # s, of a latent's first frame
    which = np.searchsorted(ends, at, side="right")
    return tuple((int((which == n).sum()), shot.caption) for n, shot in enumerate(shots) if (which == n).any())


def tail(frames_THWC: np.ndarray, latents: int, grid: Geometry) -> np.ndarray:
    """The last frames of a video: as many as give at most `latents` latent frames, and at least one."""
    latents = max(1, min(latents, 1 + (len(frames_THWC) - 1) // grid.temporal_stride))
    return frames_THWC[len(frames_THWC) - 1 - (latents - 1) * grid.temporal_stride :]


def encode(vae: FrozenVae, frames_THWC: np.ndarray) -> Tensor:
    """Encode 1 + k * stride frames to normalised latents `(C, T, H, W)`."""
    video_TCHW = to_video(np.ascontiguousarray(frames_THWC))
    return vae.encode(video_TCHW.transpose(0, 1).unsqueeze(0))[0]


def encode_end(vae: FrozenVae, frames_THWC: np.ndarray, latents: int, grid: Geometry) -> Tensor:
    """Encode the frames that end a clip: a multiple of the stride, with one more frame before them.

    The first latent frame of any encoding holds a single frame and can't be part of a clip's end; it is only there
    because the causal VAE starts with it. If there are fewer frames than one stride, the last one is repeated.
    """
    stride = grid.temporal_stride
    count = max(1, min(latents, (len(frames_THWC) - 1) // stride))
    frames = frames_THWC[: 1 + count * stride]
    still = np.repeat(frames[-1:], 1 + count * stride - len(frames), axis=0)
    return encode(vae, np.concatenate((frames, still)))


def inside(config: Config, prompt: Prompt, request: Request) -> tuple[int, int]:
    """Count the given frames at the beginning and at the end of a clip that are part of the clip."""
    stride = config.vae.temporal_stride
    held = {first: latents.shape[1] for first, latents in request.given}
    before = 0 if prompt.before is None else 1 + (held[0] - 1) * stride
    if prompt.after is None:
        return before, 0
    return before, 1 + stride * next(count for first, count in held.items() if first + count == request.grid[0])


def fits(start_THWC: np.ndarray, size: Size) -> np.ndarray:
    """Cut a video to the length of a clip, or extend it by repeating its last frame."""
    missing = max(0, size[0] - len(start_THWC))
    return np.concatenate((start_THWC, np.repeat(start_THWC[-1:], missing, axis=0)))[: size[0]]
