"""What a user gives to sample from: captions with times, images and videos at either end, a video to start from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from sora_train.config.cost import geometry
from sora_train.config.schema import Config
from sora_train.core.cli import InputError
from sora_train.core.cost import Geometry
from sora_train.core.pixels import to_video
from sora_train.data.read.whole_file import read_file
from sora_train.encoding.vae import FrozenVae
from sora_train.flow.ode import Request

Size = tuple[int, int, int]  # frames, height, width


@dataclass(frozen=True)
class Shot:
    """A caption, and for how many seconds it holds."""

    seconds: float
    caption: str


def read_shots(prompt: Any) -> list[Shot]:
    """A caption, or a list of {seconds, caption}. Raises InputError for anything else."""
    if not isinstance(prompt, list):
        return [Shot(float("inf"), str(prompt))]
    shots = []
    for entry in prompt:
        if not isinstance(entry, dict) or set(entry) != {"seconds", "caption"}:
            raise InputError(f"prompt: {entry!r} is no shot; give [{{seconds: 2, caption: ...}}, ...]")
        if not isinstance(entry["seconds"], (int, float)) or not entry["seconds"] > 0:
            raise InputError(f"prompt: seconds={entry['seconds']!r} must be a number above 0")
        shots.append(Shot(float(entry["seconds"]), str(entry["caption"])))
    if not shots:
        raise InputError("prompt: an empty list of shots")
    return shots


def read_frames(path: str | None, fps: float) -> np.ndarray | None:
    """The frames of an image, or those that a video shows at each n / fps. Raises InputError for any other file."""
    return None if path is None else read_file(path, fps)[0]


def resized(frames_THWC: np.ndarray, size: Size) -> np.ndarray:
    """Frames in the clip's height and width."""
    shape = (size[2], size[1])
    return np.stack([np.asarray(Image.fromarray(f).resize(shape, Image.Resampling.BICUBIC)) for f in frames_THWC])


def clip_size(
    config: Config, given: np.ndarray | None, height: int | None, width: int | None, seconds: float | None
) -> Size:
    """Frames, height and width of a clip: as asked, else the given frames' shape, else a square of the trained area."""
    grid = geometry(config)
    if not (height and width):
        shape = given.shape[1:3] if given is not None else (height or 1, width or 1)
        scale = (config.data.max_pixels / (shape[0] * shape[1])) ** 0.5
        height, width = round(shape[0] * scale), round(shape[1] * scale)
    height, width = (max(1, round(side / grid.multiple)) * grid.multiple for side in (height, width))
    frames = config.data.max_frames if seconds is None else max(1, round(seconds * config.data.made_fps))
    return 1 + (frames - 1) // grid.temporal_stride * grid.temporal_stride, height, width


@dataclass
class Prompt:
    """One video to make, everything at its size: given frames at its beginning and end, or a video to start from."""

    shots: list[Shot]
    before: np.ndarray | None = None
    after: np.ndarray | None = None
    start: np.ndarray | None = None
    strength: float = 1.0
    most: int | None = None  # latent frames given at either end at most; null: half a clip, at both ends a third each

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
            caption, grid.grid(*size), seed, tuple(given), start, self.strength, shots if len(shots) > 1 else (), lead
        )


def spans(shots: Sequence[Shot], frames: int, first: int, stride: int, fps: float) -> tuple[tuple[int, str], ...]:
    """How many latent frames of a clip that begins at frame `first` hear which caption; the last one goes on."""
    ends = np.cumsum([shot.seconds for shot in shots])[:-1]
    at = [(first + max(0, 1 + (place - 1) * stride)) / fps for place in range(frames)]  # a latent's first frame
    which = np.searchsorted(ends, at, side="right")
    return tuple((int((which == n).sum()), shot.caption) for n, shot in enumerate(shots) if (which == n).any())


def tail(frames_THWC: np.ndarray, latents: int, grid: Geometry) -> np.ndarray:
    """The last frames, as many as fill at most so many latent frames."""
    latents = max(1, min(latents, 1 + (len(frames_THWC) - 1) // grid.temporal_stride))
    return frames_THWC[len(frames_THWC) - 1 - (latents - 1) * grid.temporal_stride :]


def encode(vae: FrozenVae, frames_THWC: np.ndarray) -> Tensor:
    """Normalised latents `(C, T, H, W)` of 1 + k * stride frames."""
    video_TCHW = to_video(np.ascontiguousarray(frames_THWC))
    return vae.encode(video_TCHW.transpose(0, 1).unsqueeze(0))[0]


def encode_end(vae: FrozenVae, frames_THWC: np.ndarray, latents: int, grid: Geometry) -> Tensor:
    """Latents of frames that end a clip: whole strides of them, encoded after one more frame before them.

    The first latent frame of any encoding holds one frame alone, and has no place at a clip's end: it only leads there.
    Fewer frames than one stride stand still to fill it.
    """
    stride = grid.temporal_stride
    count = max(1, min(latents, (len(frames_THWC) - 1) // stride))
    frames = frames_THWC[: 1 + count * stride]
    still = np.repeat(frames[-1:], 1 + count * stride - len(frames), axis=0)
    return encode(vae, np.concatenate((frames, still)))


def around(config: Config, prompt: Prompt, request: Request, video: np.ndarray) -> np.ndarray:
    """A clip with what is given but didn't fit into it: earlier frames before, later frames behind."""
    stride, pieces = config.vae.temporal_stride, [video]
    held = {first: latents.shape[1] for first, latents in request.given}
    if prompt.before is not None:
        inside = 1 + (held[0] - 1) * stride
        pieces.insert(0, prompt.before[: len(prompt.before) - inside])
    if prompt.after is not None:
        inside = 1 + stride * next(count for first, count in held.items() if first + count == request.grid[0])
        pieces.append(prompt.after[inside:])
    return np.concatenate(pieces)


def fits(start_THWC: np.ndarray, size: Size) -> np.ndarray:
    """The first frames of a video to start from, the last one repeated where it is shorter than the clip."""
    missing = max(0, size[0] - len(start_THWC))
    return np.concatenate((start_THWC, np.repeat(start_THWC[-1:], missing, axis=0)))[: size[0]]


def check_strength(strength: float) -> None:
    """Raises InputError for a strength outside (0, 1]."""
    if not 0.0 < strength <= 1.0:
        raise InputError(f"strength={strength} must be above 0 and at most 1")
