"""Near-duplicates among clips, found by sequences of perceptual hashes at any offset, mirrored or not.

Two clips are near-duplicates if, at some offset, the mean number of differing bits over three seconds (or over all of
the shorter clip) is at most `near`. Candidates are clips with a similar picture: a few hashes of the clip in question
are compared with every hash of every clip, which takes some milliseconds for a hundred thousand clips.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_tools.curation.hashes import distances, from_text
from data_tools.curation.look import RATE

OVERLAP = round(3 * RATE)  # pictures
_ASKED = 6  # hashes of a clip that candidates are searched by
_SHARED = 12  # bits by which a hash of a candidate may differ from one of them


class Match(NamedTuple):
    """A clip that is near another: its number, the mean number of bits that differ, and whether it is mirrored."""

    number: int
    bits: float
    mirrored: bool


@dataclass
class Hashed:
    """A clip, as the hashes of its pictures, uint64."""

    key: str
    plain_S: np.ndarray
    mirrored_S: np.ndarray
    shot: str = ""  # the shot that it is a part of: parts of one shot are never duplicates

    @classmethod
    def of(cls, key: str, plain: str, mirrored: str, shot: str = "") -> Hashed:
        """Parse the texts of hashes that the stage `scores` returns."""
        return cls(key, from_text(plain), from_text(mirrored), shot)


class HashIndex:
    """Searchable index of the hashes of clips, in the order in which they were added. It can be written to a file."""

    def __init__(self) -> None:
        self.keys: list[str] = []
        self._shots: list[str] = []
        self._bank = np.zeros(1024, np.uint64)
        self._owner = np.zeros(1024, np.int32)
        self._starts = [0]

    def add(self, clip: Hashed) -> None:
        """Add a clip."""
        first, end = self._starts[-1], self._starts[-1] + len(clip.plain_S)
        while end > len(self._bank):
            self._bank, self._owner = (np.concatenate([one, np.zeros_like(one)]) for one in (self._bank, self._owner))
        self._bank[first:end] = clip.plain_S
        self._owner[first:end] = len(self.keys)
        self._starts.append(end)
        self.keys.append(clip.key)
        self._shots.append(clip.shot)

    def nearest(self, clip: Hashed) -> Match | None:
        """Find the nearest clip of the index; None if none has a similar picture."""
        best: Match | None = None
        for hashes, mirrored in ((clip.plain_S, False), (clip.mirrored_S, True)):
            for number in self._candidates(hashes):
                if clip.shot and self._shots[number] == clip.shot:
                    continue
                bits = aligned(hashes, self._bank[self._starts[number] : self._starts[number + 1]])
                if best is None or bits < best.bits:
                    best = Match(number, bits, mirrored)
        return best

    def write(self, path: Path) -> None:
        """Write the index as Parquet: `key`, and `hashes` as bytes of little-endian uint64."""
        hashes = [self._bank[a:b].astype("<u8").tobytes() for a, b in zip(self._starts, self._starts[1:], strict=False)]
        temporary = path.with_name(f".{path.name}.tmp")
        pq.write_table(pa.table({"key": self.keys, "hashes": pa.array(hashes, pa.binary())}), temporary)
        temporary.replace(path)

    @classmethod
    def read(cls, path: Path) -> HashIndex:
        """Read an index that `write` has written."""
        index = cls()
        table = pq.read_table(path)
        for key, data in zip(table["key"].to_pylist(), table["hashes"].to_pylist(), strict=True):
            hashes = np.frombuffer(data, "<u8").astype(np.uint64)
            index.add(Hashed(key, hashes, hashes))
        return index

    def _candidates(self, hashes_S: np.ndarray) -> list[int]:
        end = self._starts[-1]
        places = np.unique(np.linspace(0, len(hashes_S) - 1, min(_ASKED, len(hashes_S))).round().astype(int))
        found: set[int] = set()
        for asked in hashes_S[places]:
            near = distances(self._bank[:end], asked) <= _SHARED
            found.update(np.unique(self._owner[:end][near]).tolist())
        return sorted(found)


def aligned(one_S: np.ndarray, other_S: np.ndarray) -> float:
    """The least mean number of differing bits of two sequences, over all offsets at which they overlap enough."""
    need = min(OVERLAP, len(one_S), len(other_S))
    best = 64.0
    for offset in range(need - len(other_S), len(one_S) - need + 1):
        first, end = max(0, offset), min(len(one_S), offset + len(other_S))
        best = min(best, float(distances(one_S[first:end], other_S[first - offset : end - offset]).mean()))
    return best


@dataclass(frozen=True)
class Near:
    """Clips that are near an earlier one: key -> that clip's key, and the mean number of differing bits."""

    dropped: dict[str, tuple[str, float]]
    to_review: dict[str, tuple[str, float]]
    index: HashIndex  # of the clips that weren't dropped


def find_near(clips: Sequence[Hashed], near: float, review: float) -> Near:
    """Find clips that are near-duplicates of an earlier, preferred one.

    Args:
        clips: Clips in the order of preference.
        near: Mean number of differing bits, of 64, up to which a clip is dropped.
        review: The same, up to which a clip is listed for review.
    """
    found = Near({}, {}, HashIndex())
    for clip in clips:
        match = found.index.nearest(clip)
        other = (found.index.keys[match.number], round(match.bits, 2)) if match else None
        if match and other and match.bits <= near:
            found.dropped[clip.key] = other
            continue
        if match and other and match.bits <= review:
            found.to_review[clip.key] = other
        found.index.add(clip)
    return found
