"""The visits of a window as columns: which frames and which area each visit takes from its sample."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np

from sora_train.core.batch import Visit
from sora_train.core.seeds import below
from sora_train.data.order.times import available, distance, thousandths

_SHIFT, _ANYWHERE = (1 << 34) + np.arange(2)  # streams of where a long clip is cut


@dataclass(frozen=True)
class Visits:
    """Many visits as columns; a row becomes a `Visit` on access."""

    sample: np.ndarray
    first: np.ndarray  # source frame
    frames: np.ndarray
    fps: np.ndarray
    resize: np.ndarray  # (n, 2)
    crop: np.ndarray  # (n, 4)
    tasks: tuple[str, ...]
    task: np.ndarray  # which of `tasks`
    seed: np.ndarray
    tokens: np.ndarray

    @property
    def pixels(self) -> np.ndarray:
        """Pixels of all frames of each clip together."""
        return np.asarray(self.frames, dtype=np.int64) * self.crop[:, 2] * self.crop[:, 3]

    def arrays(self) -> dict[str, np.ndarray]:
        """All columns as arrays by name, to be written to a file; `of_arrays` restores them."""
        return {field.name: np.asarray(getattr(self, field.name)) for field in fields(self)}

    @staticmethod
    def of_arrays(arrays: Any) -> Visits:
        """Restore visits from the columns that `arrays` returned."""
        columns = {field.name: arrays[field.name] for field in fields(Visits)}
        return Visits(**columns | {"tasks": tuple(columns["tasks"].tolist())})

    def __getitem__(self, n: int) -> Visit:
        return Visit(
            sample=int(self.sample[n]),
            first=int(self.first[n]),
            frames=int(self.frames[n]),
            fps=float(self.fps[n]),
            resize=(int(self.resize[n, 0]), int(self.resize[n, 1])),
            crop=tuple(map(int, self.crop[n])),  # type: ignore[arg-type]
            task=self.tasks[int(self.task[n])],
            seed=int(self.seed[n]),
        )


class Cuts(NamedTuple):
    """Cuts of samples in time and space, whichever part they take of each."""

    fps: np.ndarray  # of a clip; 0 for an image
    available: np.ndarray  # frames of the whole sample at the clip's rate
    frames: np.ndarray  # of a clip
    span: np.ndarray  # source frames from the first to the last frame of a clip, both included
    resize: np.ndarray  # (n, 2)
    crop: np.ndarray  # (n, 4)
    per_frame: np.ndarray  # tokens of a latent frame
    tokens: np.ndarray  # of a clip


def cuts(
    index: Any, rows: np.ndarray, fps: float, max_frames: int, max_pixels: int, max_tokens: int, *, fit: str,
    multiple: int, temporal_stride: int,
) -> Cuts:  # fmt: skip
    """Cut samples (rows of an index), at `fps` frames a second, or their own rate where that is 0.

    `multiple` is the side of a token in pixels.
    """
    own = index.fps[rows].astype(np.float64)
    rate = own if fps == 0 else np.where(own > 0, fps, 0.0)
    source, clip = thousandths(own), thousandths(rate)
    whole = available(index.frames[rows].astype(np.int64), source, clip)
    resize, crop = fit_sizes(index.height[rows], index.width[rows], max_pixels, multiple, fit)
    per_frame = crop[:, 2] * crop[:, 3] // multiple**2
    longest = np.minimum(max_frames, 1 + (max_tokens // per_frame - 1) * temporal_stride)
    frames = 1 + (np.minimum(whole, longest) - 1) // temporal_stride * temporal_stride
    latent = 1 + (frames - 1) // temporal_stride
    span = 1 + distance(frames - 1, source, clip)
    return Cuts(rate, whole, frames, span, resize, crop, per_frame, latent * per_frame)


def cut_pieces(frames: np.ndarray, span: np.ndarray, turn: np.ndarray, seeds: np.ndarray) -> np.ndarray:
    """First source frame of each of many visits, `(n,)`.

    A sample that is longer than a clip is visited in rounds of P + 1 clips: P clips that together cover all its frames,
    with boundaries drawn anew in each round, and one that begins at a random frame. The position of the first visit in
    its round is drawn for each sample.

    Args:
        frames: Source frames of the sample.
        span: Source frames that a clip spans; P = ceil(frames / span).
        turn: Number of the visit to the sample.
        seeds: Seed of the sample.
    """
    pieces = -(-frames // span)
    number = turn + below(pieces + 1, seeds, _SHIFT)
    lap, piece = number // (pieces + 1), number % (pieces + 1)
    shift = below(pieces * span - frames + 1, seeds, _SHIFT, lap)
    covering = np.clip(piece * span - shift, 0, frames - span)
    return np.where(piece < pieces, covering, below(frames - span + 1, seeds, _ANYWHERE, lap))


def fit_sizes(
    height: np.ndarray, width: np.ndarray, max_pixels: int, multiple: int, fit: str
) -> tuple[np.ndarray, np.ndarray]:
    """Sizes on the patch grid with at most `max_pixels`, never larger than the source (but at least one patch).

    Returns the size to which the source is resized, `(n, 2)`, and the crop of that, `(n, 4)`: top, left, height, width.
    """
    height, width = height.astype(np.int64), width.astype(np.int64)
    scale = np.minimum(1.0, np.sqrt(max_pixels / (height * width)))
    rounded = [
        np.maximum(1, np.minimum(np.rint(side * scale / multiple), side // multiple)).astype(np.int64)
        for side in (height, width)
    ]
    while (over := rounded[0] * rounded[1] * multiple**2 > np.maximum(max_pixels, multiple**2)).any():
        taller = rounded[0] >= rounded[1]
        rounded[0] = np.where(over & taller, np.maximum(1, rounded[0] - 1), rounded[0])
        rounded[1] = np.where(over & ~taller, np.maximum(1, rounded[1] - 1), rounded[1])
    out_h, out_w = rounded[0] * multiple, rounded[1] * multiple
    if fit == "stretch":
        return np.stack((out_h, out_w), 1), np.stack((0 * out_h, 0 * out_w, out_h, out_w), 1)
    cover = np.maximum(out_h / height, out_w / width)
    resized = [
        np.maximum(out, np.rint(side * cover)).astype(np.int64) for out, side in ((out_h, height), (out_w, width))
    ]
    top, left = (resized[0] - out_h) // 2, (resized[1] - out_w) // 2
    return np.stack(resized, 1), np.stack((top, left, out_h, out_w), 1)
