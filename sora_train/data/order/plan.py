"""The plan: which samples go into which step and slot, cut how, with which seed. A pure function of its inputs.

Shards are shuffled by the hash of (seed, epoch, shard) and cut into windows of consecutive shards. A window's samples
are shuffled, cut to clips, packed into steps of equal make-up and dealt to the slots of each step by cost. Neither
ranks nor workers nor time enter, so every rank computes the same plan, and any window can be planned alone. What is
left out on the way is an amendment: from an epoch on, without these samples.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from threading import RLock
from typing import Any, NamedTuple

import numpy as np

from sora_train.core.batch import Visit
from sora_train.core.cli import InputError
from sora_train.core.cost import Cost, Geometry, Seconds
from sora_train.core.seeds import FIRST_FRAME, TASK, hash64, order, uniform
from sora_train.data.index.index import Index
from sora_train.data.order.packing import pack, spans
from sora_train.data.order.selection import Selection
from sora_train.data.order.shared_windows import SharedWindows
from sora_train.data.order.visits import Cuts, Visits, cut_pieces, cuts

_SHARDS, _SAMPLES, _REPEATS, _DEAL = (1 << 32) + np.arange(4)  # streams of the plan's own hashes
_REMEMBERED = 3  # windows


class Slots(Sequence[list[Visit]]):
    """The slots of one step; a slot's visits are built on access.

    `spans` has, for each slot, the first slot of its pack, and the number of slots that the pack takes, up to `most`.
    """

    def __init__(self, visits: Visits | None, packs: list[list[int]], most: int = 1) -> None:
        self.visits, self.packs = visits, packs
        self.spans = spans(packs, most)

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, slot: int) -> list[Visit]:  # type: ignore[override]
        assert self.visits is not None, "a step has visits"
        return sorted((self.visits[i] for i in self.packs[slot]), key=lambda v: v.size)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Slots) and list(self) == list(other)


class Position(NamedTuple):
    """Position of a run in its plan: the next step to take."""

    epoch: int = 0
    window: int = 0
    step: int = 0


class Amendment(NamedTuple):
    """Samples (rows of the index) that are left out from an epoch on."""

    epoch: int
    samples: tuple[int, ...]


@dataclass(frozen=True)
class PlanInputs:
    """Everything a plan depends on, beside the index and the amendments."""

    seed: int
    slots: int
    max_tokens: int
    fill: float
    window: int
    fps: float  # of clips; 0: each its own
    max_frames: int
    max_pixels: int
    fit: str
    tasks: tuple[tuple[str, float], ...]
    repeats: tuple[float, ...]  # of each shard
    geometry: Geometry
    cost: Cost | Seconds
    filters: tuple[str, ...] = ()  # of each shard, or none at all
    captions: tuple[tuple[str, float], ...] = ()  # weights by name; drawn by the loader
    weight: str = ""  # visits of each sample per epoch, times its shard's; an expression, empty for one
    pack_slots: int = 1  # that a pack may take

    def cuts(self, index: Index, rows: np.ndarray) -> Cuts:
        """Cuts of the visits of some rows of an index."""
        grid = self.geometry
        return cuts(index, rows, self.fps, self.max_frames, self.max_pixels, self.max_tokens * self.pack_slots,
                    fit=self.fit, multiple=grid.multiple, temporal_stride=grid.temporal_stride)  # fmt: skip


class Plan:
    """Steps of visits over an index. Raises InputError if even one clip can't fit a slot, or for a wrong filter."""

    def __init__(self, index: Index, inputs: PlanInputs) -> None:
        self.index, self.inputs = index, inputs
        text = json.dumps({"inputs": asdict(inputs), "index": index.fingerprint}, sort_keys=True)
        self.hash = hashlib.sha256(text.encode()).hexdigest()
        multiple = inputs.geometry.multiple
        if inputs.max_pixels < multiple**2 or inputs.pack_slots * inputs.max_tokens < inputs.max_pixels // multiple**2:
            raise InputError(
                f"data.max_tokens={inputs.max_tokens} can't hold one frame of data.max_pixels={inputs.max_pixels} "
                f"(a token is {multiple}x{multiple} pixels); raise data.max_tokens"
            )
        self.amendments: list[Amendment] = []
        self._selection = Selection(index, inputs.filters, inputs.weight)
        self._expected = np.diff(index.first)  # visits of each shard per epoch at a rate of 1, roughly, to cut windows
        if inputs.weight:
            self._expected = np.maximum(self._selection.visits(), 1e-9)
        self._handed_out = -1  # the latest epoch of which a step was given away
        self._planned: OrderedDict[tuple[int, int], list[Slots]] = OrderedDict()
        self._windows: dict[int, list[np.ndarray]] = {}  # of the last epochs asked for
        self._lock = RLock()  # a thread plans the next window meanwhile
        self._planner: ThreadPoolExecutor | None = None
        self.shared: SharedWindows | None = None  # where the ranks of a node share what they plan

    @cached_property
    def filtered(self) -> int:
        """Number of usable samples that the filters leave out."""
        return int(self.index.usable.sum() - self._selection.per_shard().sum()) if any(self.inputs.filters) else 0

    def windows(self, epoch: int) -> list[np.ndarray]:
        """The shards of each window of an epoch, in order."""
        if epoch not in self._windows:
            i = self.inputs
            shards = order(i.seed, epoch, _SHARDS, np.arange(len(self.index.shards)))
            expected = self._expected[shards] * np.maximum(np.asarray(i.repeats)[shards], 1e-9)
            ends = np.cumsum(expected)
            size = ends[-1] / max(1, math.ceil(ends[-1] / i.window - 0.25))  # equal windows: no small one at the end
            number = ((ends - expected) // size).astype(np.int64)
            kept = dict(list(self._windows.items())[-1:])  # the epoch before, at the turn of two
            self._windows = kept | {epoch: np.split(shards, np.flatnonzero(np.diff(number)) + 1)}
        return self._windows[epoch]

    def before(self, at: Position) -> str:
        """Hash of the file names of the shards that an epoch visits before the window of `at`.

        In another plan with the same hash, the rest of the epoch begins with the window of `at`.
        """
        names = [
            [self.index.shards[shard].rpartition("/")[2] for shard in shards.tolist()]
            for shards in self.windows(at.epoch)[: at.window]
        ]
        return hashlib.sha256(json.dumps(names).encode()).hexdigest()[:16]

    def steps(self, epoch: int, window: int) -> list[Slots]:
        """The steps of one window; the last few are remembered."""
        with self._lock:
            steps = self._planned.pop((epoch, window), None)
            if steps is None:
                visits, packed = self._get_window(epoch, window)
                steps = [Slots(visits, packs, self.inputs.pack_slots) for packs in packed]
            self._planned[epoch, window] = steps
            if len(self._planned) > _REMEMBERED:
                self._planned.popitem(last=False)
            return steps

    def from_position(self, at: Position, taken: int = 0) -> Iterator[tuple[Position, Slots]]:
        """Steps from `at` on, for ever, each with its own position; how many were taken before is all the same."""
        epoch, window, step = at.epoch, at.window, at.step
        empty = 0
        while True:
            count = len(self.windows(epoch))
            for w in range(window, count):
                steps = self.steps(epoch, w)
                self._plan_ahead(*((epoch, w + 1) if w + 1 < count else (epoch + 1, 0)))
                for s in range(step, len(steps)):
                    self._handed_out = max(self._handed_out, epoch)
                    yield Position(epoch, w, s), steps[s]
                empty, step = (0 if steps else empty + 1), 0
                if empty > count:
                    weight = self.inputs.weight
                    raise InputError(
                        "the plan holds no step: no sample is usable; look at the index's refusals"
                        + (f" and data.filter, which leaves out {self.filtered}" if self.filtered else "")
                        + (f"; is data.weight={weight!r} above 0 for any sample?" if weight else "")
                    )
            epoch, window, step = epoch + 1, 0, 0

    def count(self, epochs: float) -> int:
        """Number of steps of so many epochs from the first on, at least 1; of a part of an epoch that share of them."""
        whole, part = divmod(epochs, 1.0)
        sizes = [
            sum(len(self.steps(epoch, window)) for window in range(len(self.windows(epoch))))
            for epoch in range(math.ceil(epochs))
        ]
        return max(1, sum(sizes[: int(whole)]) + (round(part * sizes[-1]) if part else 0))

    def epoch_after(self, at: Position, ahead: int) -> int:
        """The epoch of the step that is `ahead` steps after the one at `at`."""
        epoch, window, left = at.epoch, at.window, at.step + ahead
        while left >= (count := len(self.steps(epoch, window))):
            left, window = left - count, window + 1
            if window == len(self.windows(epoch)):
                epoch, window = epoch + 1, 0
        return epoch

    def restore(self, amendments: Iterable[Any]) -> None:
        """Take over amendments: pairs of an epoch and rows, as a checkpoint kept them or with more behind."""
        with self._lock:
            self._restore(amendments)

    def _restore(self, amendments: Iterable[Any]) -> None:
        merged: dict[int, set[int]] = {}
        for epoch, samples in amendments:
            merged.setdefault(epoch, set()).update(samples)
        new = [Amendment(epoch, tuple(sorted(samples))) for epoch, samples in sorted(merged.items())]
        changed = [a.epoch for a in new if a not in self.amendments]
        if changed and min(changed) <= self._handed_out:
            raise RuntimeError(f"steps of epoch {self._handed_out} were given away; epoch {min(changed)} can't change")
        self.amendments = new
        self._planned = OrderedDict((k, v) for k, v in self._planned.items() if not changed or k[0] < min(changed))

    def _plan_ahead(self, epoch: int, window: int) -> None:
        """Plan a window in the background, where the step doesn't wait for it."""
        if (epoch, window) not in self._planned:
            self._planner = self._planner or ThreadPoolExecutor(1, thread_name_prefix="planner")
            self._planner.submit(self.steps, epoch, window)  # an error comes again when the window is needed

    def _get_window(self, epoch: int, window: int) -> tuple[Visits | None, list[list[list[int]]]]:
        if self.shared is None:
            return self._plan_window(epoch, window)
        without = [a for a in self.amendments if a.epoch <= epoch]
        tag = hashlib.sha256(json.dumps(without).encode()).hexdigest()[:16]
        return self.shared.get(f"{epoch}-{window}-{tag}", lambda: self._plan_window(epoch, window))

    def _plan_window(self, epoch: int, window: int) -> tuple[Visits | None, list[list[list[int]]]]:
        i, shards = self.inputs, self.windows(epoch)[window]
        rows, repeat, rates = self._rows(epoch, shards)
        if not len(rows):
            return None, []
        shuffled = order(i.seed, epoch, _SAMPLES, rows, repeat)
        visits = self._visits(epoch, rows[shuffled], repeat[shuffled], rates[shuffled])
        costs = i.cost.of_clips(visits.tokens, visits.pixels)
        seed = int(hash64(i.seed, epoch, _DEAL, int(shards[0])))
        undivided = i.cost.undivided(visits.tokens, visits.pixels)
        return visits, pack(visits.tokens, costs, i.slots, i.max_tokens, i.fill, seed, most=i.pack_slots,
                            undivided=undivided)  # fmt: skip

    def _rows(self, epoch: int, shards: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows of the shards that may be used, as often as shard and weight say; the number of the repeat; the rate."""
        rows, of_shard = self._selection.rows(shards)
        left_out = [np.asarray(a.samples, dtype=np.int64) for a in self.amendments if a.epoch <= epoch]
        if left_out:
            kept = ~np.isin(rows, np.concatenate(left_out))
            rows, of_shard = rows[kept], of_shard[kept]
        rates = np.asarray(self.inputs.repeats)[of_shard]
        if self.inputs.weight:
            rates = rates * self._selection.weights(rows)
        whole = np.floor(rates).astype(np.int64)
        times = whole + (uniform(self.inputs.seed, epoch, _REPEATS, rows) < rates - whole)
        repeat = np.arange(times.sum()) - np.repeat(np.cumsum(times) - times, times)
        return np.repeat(rows, times), repeat, np.repeat(rates, times)

    def _visits(self, epoch: int, rows: np.ndarray, repeat: np.ndarray, rates: np.ndarray) -> Visits:
        i, index = self.inputs, self.index
        seeds = hash64(i.seed, epoch, rows, repeat)
        cut = i.cuts(index, rows)
        turn = epoch * np.ceil(rates).astype(np.int64) + repeat  # how many visits this sample has had before
        frames = index.frames[rows].astype(np.int64)
        first = cut_pieces(frames, cut.span, turn, hash64(i.seed, rows, FIRST_FRAME))
        names = [name for name, weight in i.tasks if weight > 0]
        weights = np.array([weight for _, weight in i.tasks if weight > 0])
        drawn = np.searchsorted(np.cumsum(weights) / weights.sum(), uniform(seeds, TASK), side="right")
        return Visits(rows, first, cut.frames, cut.fps, cut.resize, cut.crop, (*names, "image"),
                      np.where(cut.frames == 1, len(names), drawn), seeds, cut.tokens)  # fmt: skip
