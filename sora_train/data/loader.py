"""Plan and pool to packs, in order: the slots of one rank, several steps in flight."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np

from sora_train.core.batch import Clip, Pack, Refusal, Visit
from sora_train.core.cli import InputError
from sora_train.core.pixels import to_video
from sora_train.core.seeds import CAPTION, below, uniform
from sora_train.data.index.index import Index
from sora_train.data.latents import Encoded, check_size, read
from sora_train.data.order.curriculum import Stages
from sora_train.data.order.plan import Plan, Position, Slots
from sora_train.data.order.times import source_frames
from sora_train.data.read.decode import DecodeError
from sora_train.data.read.encoded import LATENT
from sora_train.data.read.pool import Pool

Known = Mapping[
    tuple[tuple[int, ...], int], Refusal
]  # what an earlier attempt at a step refused, by position and sample


@dataclass
class Step:
    """One rank's packs for one optimizer step: as many packs as every other rank, some perhaps without a clip.

    Of ranks that share a pack, the first answers for its samples.
    """

    position: Position
    packs: list[Pack]

    @property
    def samples(self) -> list[int]:
        """Rows of the clips that arrived."""
        return [clip.visit.sample for pack in self.packs if pack.part[0] == 0 for clip in pack.clips]

    @property
    def refused(self) -> list[Refusal]:
        """The samples that didn't."""
        return [refusal for pack in self.packs if pack.part[0] == 0 for refusal in pack.refused]


@dataclass(frozen=True)
class Sharing:
    """Division of packs over ranks that share them.

    Attributes:
        part: This rank's part `(i, n)` of every pack, where all ranks of a group have the same passes.
        most: Ranks that may share a pack, where the plan says which packs take several slots.
    """

    part: tuple[int, int] = (0, 1)
    most: int = 1

    def of(self, slots: list[int], spans: Sequence[tuple[int, int]]) -> tuple[list[int], tuple[int, int]]:
        """The slots whose visits a rank computes in a pass that takes `slots`, and its part of the pack.

        A pack of several slots is computed by the ranks of the first ones, as many as can share it; those of the other
        slots have nothing to do in these passes.
        """
        if self.most == 1 or not slots:
            return slots, self.part
        (slot,) = slots
        first, width = spans[slot]
        ranks = min(width, self.most)
        return ([first], (slot - first, ranks)) if slot < first + ranks else ([], (0, 1))


def passes_of_rank(slots: int, rank: int, ranks: int, accumulation: int | None) -> list[list[int]]:
    """The slots that each forward pass of a rank takes; every rank has as many passes, the last may be empty.

    Without `accumulation` a pass is a slot; with it, a rank's slots are shared out over that many passes.
    Raises InputError if there are fewer slots per rank than passes.
    """
    per_rank = -(-slots // ranks)
    passes = accumulation or per_rank
    if passes > per_rank:
        raise InputError(
            f"parallel.accumulation={passes} passes for {per_rank} slot(s) per rank ({slots} slots, {ranks} ranks); "
            "raise data.slots or lower parallel.accumulation"
        )
    mine = list(range(rank, slots, ranks))
    return [mine[number::passes] for number in range(passes)]


class Loader:
    """Iterates over this rank's part of every step from a position on, for ever."""

    def __init__(
        self,
        plan: Plan | Stages,
        pool: Pool,
        passes: list[list[int]],
        start: Position,
        prefetch_steps: int,
        known: Known | None = None,
        *,
        pin: bool = False,
        taken: int = 0,
        cache_bytes: int = 0,
        sharing: Sharing = Sharing(),  # noqa: B008 (frozen)
        augment: Callable[[np.ndarray, str, int], tuple[np.ndarray, str]] | None = None,
    ) -> None:
        self.plan, self.index, self.pool = plan, plan.index, pool
        self._decoded, self._augment = DecodedClips(cache_bytes), augment
        self.passes, self.known, self.pin, self.sharing = passes, known or {}, pin, sharing
        self._steps = plan.from_position(start, taken)
        self._flying: deque[_Flying] = deque()
        self._prefetch = prefetch_steps

    def __iter__(self) -> Iterator[Step]:
        while True:
            while len(self._flying) < self._prefetch:
                self._flying.append(self._launch(*next(self._steps)))
            yield self._land(self._flying.popleft())

    def _launch(self, position: Position, slots: Slots) -> _Flying:
        groups = []
        for passed in self.passes:
            numbers, part = self.sharing.of(passed, slots.spans)
            visits = sorted((v for n in numbers for v in slots[n]), key=lambda v: v.size)
            groups.append(([(v, self._request(position, v)) for v in visits], part))
        return _Flying(position, groups)

    def _request(self, position: Position, visit: Visit) -> _Request | Refusal:
        if (position, visit.sample) in self.known:
            return self.known[position, visit.sample]
        path, extension, member = self.index.member(visit.sample)
        captions = self.pool.submit(self.index.captions, visit.sample) if self.index.captioned else None
        if extension == LATENT:
            return _Request(self.pool.submit(read, self.index, visit.sample), captions)
        kept = self._decoded.get(visit)
        if kept is not None:
            return _Request(kept, captions)
        track = self.index.track(visit.sample)
        frames = source_frames(visit, track.fps, track.vfr)
        pixels = self.pool.decode(path, extension, member, frames, visit.resize, visit.crop, track=track)
        return _Request(pixels, captions)

    def _land(self, flying: _Flying) -> Step:
        packs = []
        for group, part in flying.groups:
            pack = Pack([], part=part)
            for visit, pending in group:
                if isinstance(pending, Refusal):
                    pack.refused.append(pending)
                    continue
                try:
                    pack.clips.append(self._clip(visit, pending))
                except DecodeError as error:
                    pack.refused.append(refusal(self.index, visit.sample, error))
            packs.append(pack.pin() if self.pin else pack)
        return Step(flying.position, packs)

    def _clip(self, visit: Visit, request: _Request) -> Clip:
        captions, fields = request.captions.result() if request.captions else ([""], {})
        drawn = draw_caption(list(fields.get("captions", ())), self.plan.inputs.captions, visit.seed)
        key, found = str(self.index.key[visit.sample]), request.content.result()
        if not isinstance(found, Encoded):
            self._decoded.keep(visit, found)
            text = captions[drawn]
            if self._augment is not None:
                found, text = self._augment(found, text, visit.seed)
            return Clip(visit, key, text, to_video(found))
        if self._augment is not None:
            raise InputError(f"data.augment: sample {key} is latents, which it can't change; train on the videos")
        grid = self.plan.inputs.geometry
        frames, height, width = grid.grid(*visit.size)
        latents, texts = check_size(found, (frames, height * grid.patch, width * grid.patch))
        none = to_video(np.empty((0, *visit.size[1:], 3), np.uint8))
        return Clip(visit, key, captions[drawn], none, latents, (texts[drawn], texts[-1]) if texts else None)


class DecodedClips:
    """Decoded clips that are kept in memory up to a number of bytes, for data sets of a few clips.

    The first clips are kept and none is evicted: every epoch visits all clips, so evicting the oldest would never hit.
    """

    def __init__(self, room: int) -> None:
        self._room = room
        self._kept: dict[tuple[Any, ...], np.ndarray] = {}

    def get(self, visit: Visit) -> Future[np.ndarray] | None:
        """The pixels of a visit, if a visit of the same part in the same size is kept."""
        pixels = self._kept.get(self._part(visit))
        if pixels is None:
            return None
        done: Future[np.ndarray] = Future()
        done.set_result(pixels)
        return done

    def keep(self, visit: Visit, pixels_THWC: np.ndarray) -> None:
        """Store the pixels of a visit if they fit."""
        part = self._part(visit)
        if part not in self._kept and pixels_THWC.nbytes <= self._room:
            self._room -= pixels_THWC.nbytes
            self._kept[part] = pixels_THWC

    @staticmethod
    def _part(visit: Visit) -> tuple[Any, ...]:
        return visit.sample, visit.first, visit.frames, visit.fps, visit.resize, visit.crop


def first_clips(
    plan: Plan | Stages, pool: Pool, agreed: Callable[[Iterator[Step]], Iterator[Step]] = iter, prefetch_steps: int = 2
) -> Iterator[Clip]:
    """The clips of a plan's first epoch in its order, all slots of a step decoded here.

    `agreed` may take clips out of the steps, so that several ranks see the same ones.
    """
    everything = [list(range(plan.inputs.slots))]
    for step in agreed(iter(Loader(plan, pool, everything, Position(), prefetch_steps))):
        if step.position.epoch > 0:
            return
        yield from step.packs[0].clips


def draw_caption(names: list[str], weights: Sequence[tuple[str, float]], seed: int) -> int:
    """Choose one of the captions with these names for a visit, by weight; evenly where no name has a weight."""
    shares = np.cumsum([dict(weights).get(name, 0.0) for name in names])
    if not len(names) or shares[-1] == 0.0:
        return int(below(max(1, len(names)), seed, CAPTION))
    return int(np.searchsorted(shares / shares[-1], uniform(seed, CAPTION), side="right"))


@dataclass
class _Flying:
    position: Position
    groups: list[tuple[list[tuple[Visit, _Request | Refusal]], tuple[int, int]]]  # and the rank's part of each


@dataclass
class _Request:
    """Pending reads of one visit."""

    content: Future[np.ndarray] | Future[Encoded]  # pixels, or what they were encoded to before
    captions: Future[tuple[list[str], dict[str, Any]]] | None  # none are read where none are wanted


def refusals(index: Index) -> list[Refusal]:
    """Samples that the index itself refuses, tars that are damaged included."""
    return [refusal(index, int(row), index.refusal(int(row))) for row in np.flatnonzero(~index.usable)]


def refusal(index: Index, sample: int, error: DecodeError) -> Refusal:
    """The record of a sample that could not be used."""
    shard = index.shards[index.shard[sample]]
    return Refusal(sample, shard, str(index.key[sample]), error.cause, error.detail)
