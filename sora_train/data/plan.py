"""The plan: which samples go into which step and slot, cut how, with which seed. A pure function of its inputs.

Shards are shuffled by the hash of (seed, epoch, shard) and cut into windows of consecutive shards. A window's samples
are shuffled, cut to clips, packed into steps of equal make-up and dealt to the slots of each step by cost. Neither
ranks nor workers nor time enter, so every rank computes the same plan, and any window can be planned alone.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np

from sora_train.batch import Visit
from sora_train.cli import InputError
from sora_train.cost import Cost, Geometry
from sora_train.data.index import Index
from sora_train.data.packing import pack
from sora_train.seeds import FIRST_FRAME, TASK, below, hash64, order, uniform

_SHARDS, _SAMPLES, _REPEATS, _DEAL = (1 << 32) + np.arange(4)  # streams of the plan's own hashes

Slots = list[list[Visit]]  # the visits of each slot of one step


class Position(NamedTuple):
    """Where a run is in its plan: the next step to take."""

    epoch: int = 0
    window: int = 0
    step: int = 0


@dataclass(frozen=True)
class PlanInputs:
    """Everything a plan depends on, beside the index."""

    seed: int
    slots: int
    max_tokens: int
    fill: float
    window: int
    fps: float
    max_frames: int
    max_pixels: int
    fit: str
    tasks: tuple[tuple[str, float], ...]
    repeats: tuple[float, ...]  # of each shard
    geometry: Geometry
    cost: Cost


class Plan:
    """Steps of visits over an index. Raises InputError if even one clip can't fit a slot."""

    def __init__(self, index: Index, inputs: PlanInputs) -> None:
        self.index, self.inputs = index, inputs
        text = json.dumps({"inputs": asdict(inputs), "index": index.fingerprint}, sort_keys=True)
        self.hash = hashlib.sha256(text.encode()).hexdigest()
        multiple = inputs.geometry.multiple
        if inputs.max_pixels < multiple**2 or inputs.max_tokens < inputs.max_pixels // multiple**2:
            raise InputError(
                f"data.max_tokens={inputs.max_tokens} can't hold one frame of data.max_pixels={inputs.max_pixels} "
                f"(a token is {multiple}x{multiple} pixels); raise data.max_tokens"
            )
        self._window: tuple[tuple[int, int], list[Slots]] | None = None

    def windows(self, epoch: int) -> list[np.ndarray]:
        """The shards of each window of an epoch, in order."""
        i = self.inputs
        shards = order(i.seed, epoch, _SHARDS, np.arange(len(self.index.shards)))
        expected = np.diff(self.index.first)[shards] * np.maximum(np.asarray(i.repeats)[shards], 1e-9)
        ends = np.cumsum(expected)
        size = ends[-1] / max(1, math.ceil(ends[-1] / i.window - 0.25))  # equal windows: no small one at the end
        number = ((ends - expected) // size).astype(np.int64)
        return np.split(shards, np.flatnonzero(np.diff(number)) + 1)

    def steps(self, epoch: int, window: int) -> list[Slots]:
        """The steps of one window; the last one asked for is remembered."""
        if self._window is None or self._window[0] != (epoch, window):
            self._window = (epoch, window), self._plan_window(epoch, self.windows(epoch)[window])
        return self._window[1]

    def from_position(self, at: Position) -> Iterator[tuple[Position, Slots]]:
        """Steps from `at` on, for ever, each with its own position."""
        epoch, window, step = at.epoch, at.window, at.step
        empty = 0
        while True:
            count = len(self.windows(epoch))
            for w in range(window, count):
                steps = self.steps(epoch, w)
                for s in range(step, len(steps)):
                    yield Position(epoch, w, s), steps[s]
                empty, step = (0 if steps else empty + 1), 0
                if empty > count:
                    raise InputError("the plan holds no step: no sample is usable; look at the index's refusals")
            epoch, window, step = epoch + 1, 0, 0

    def _plan_window(self, epoch: int, shards: np.ndarray) -> list[Slots]:
        rows, repeat = self._rows(epoch, shards)
        if not len(rows):
            return []
        visits = self._visits(epoch, rows, repeat)
        shuffled = order(self.inputs.seed, epoch, _SAMPLES, rows, repeat)
        visits = [visits[i] for i in shuffled]
        tokens = np.array([self.inputs.geometry.tokens(*v.size) for v in visits], dtype=np.int64)
        costs = self.inputs.cost.per_token * tokens + self.inputs.cost.per_pair * tokens**2
        seed = int(hash64(self.inputs.seed, epoch, _DEAL, int(shards[0])))
        steps = pack(tokens, costs, self.inputs.slots, self.inputs.max_tokens, self.inputs.fill, seed)
        return [[sorted((visits[i] for i in slot), key=lambda v: v.size) for slot in step] for step in steps]

    def _rows(self, epoch: int, shards: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Usable rows of the shards, each as often as its shard repeats, and the number of the repeat."""
        rows, repeats = [], []
        for shard in shards:
            mine = np.arange(self.index.first[shard], self.index.first[shard + 1])
            mine = mine[self.index.usable[mine]]
            rate = self.inputs.repeats[shard]
            whole = math.floor(rate)
            extra = uniform(self.inputs.seed, epoch, _REPEATS, mine) < rate - whole
            for number in range(whole + 1):
                chosen = mine if number < whole else mine[extra]
                rows.append(chosen)
                repeats.append(np.full(len(chosen), number))
        return np.concatenate(rows), np.concatenate(repeats)

    def _visits(self, epoch: int, rows: np.ndarray, repeat: np.ndarray) -> list[Visit]:
        i, index = self.inputs, self.index
        seeds = hash64(i.seed, epoch, rows, repeat)
        frames, fps = index.frames[rows].astype(np.int64), index.fps[rows]
        stride = np.maximum(1, np.rint(fps / i.fps)).astype(np.int64)
        available = 1 + (frames - 1) // stride
        resize, crop = fit_sizes(index.height[rows], index.width[rows], i.max_pixels, i.geometry.multiple, i.fit)
        per_frame = crop[:, 2] * crop[:, 3] // i.geometry.multiple**2
        longest = np.minimum(i.max_frames, 1 + (i.max_tokens // per_frame - 1) * i.geometry.temporal_stride)
        wanted = 1 + (np.minimum(available, longest) - 1) // i.geometry.temporal_stride * i.geometry.temporal_stride
        first = below(available - wanted + 1, seeds, FIRST_FRAME)
        names = [name for name, weight in i.tasks if weight > 0]
        weights = np.array([weight for _, weight in i.tasks if weight > 0])
        drawn = np.searchsorted(np.cumsum(weights) / weights.sum(), uniform(seeds, TASK), side="right")
        return [
            Visit(
                sample=int(rows[n]),
                first=int(first[n]),
                frames=int(wanted[n]),
                fps=float(fps[n] / stride[n]),
                resize=(int(resize[n, 0]), int(resize[n, 1])),
                crop=tuple(map(int, crop[n])),  # type: ignore[arg-type]
                task="image" if wanted[n] == 1 else names[drawn[n]],
                seed=int(seeds[n]),
            )
            for n in range(len(rows))
        ]


def source_frames(visit: Visit, fps: float) -> list[int]:
    """Indexes of a visit's frames in a video that runs at `fps`."""
    stride = round(fps / visit.fps) if visit.fps else 1
    return [(visit.first + n) * stride for n in range(visit.frames)]


def fit_sizes(
    height: np.ndarray, width: np.ndarray, max_pixels: int, multiple: int, fit: str
) -> tuple[np.ndarray, np.ndarray]:
    """Sizes on the patch grid with at most `max_pixels`, never larger than the source (but at least one patch).

    Returns what to resize to, `(n, 2)`, and what to cut from that, `(n, 4)` as top, left, height, width.
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
