"""Interface of a metric, and the registry that finds metrics by name or by group.

A metric maps a generated video, its real counterpart (or None) and the facts of the sample to figures by name. To add
one, decorate a function in a module that `registry.py` imports:

    @metric("brightness", groups=("quick",), better=None)
    def brightness(made_THWC, real_THWC, sample):
        return {"brightness": float(made_THWC.mean() / 255)}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

Better = Literal["up", "down"] | None  # None: neither; the closer to the real videos' figure, the better
Summary = Literal["rate", "mean", "median"]  # of the videos' figures; for a rate these are 1.0 or 0.0
Need = Literal["real", "caption", "fps", "scene", "part"]


@dataclass(frozen=True)
class Part:
    """Numbers of frames that were given at the beginning and at the end of a clip; those between were generated."""

    before: int
    after: int

    def made(self, frames: int) -> slice:
        """Slice of the generated frames in a clip of `frames` frames."""
        return slice(self.before, frames - self.after)

    def given(self, frames: int) -> list[int]:
        """Indices of the given frames in a clip of `frames` frames."""
        return [n for n in range(frames) if not self.before <= n < frames - self.after]


@dataclass(frozen=True)
class Sample:
    """All that is known about a video apart from its frames."""

    name: str
    caption: str = ""
    fps: float = 0.0
    fields: Mapping[str, Any] = field(default_factory=dict)  # of the sample's json; the demo world's `scene` is there
    part: Part | None = None  # None: all frames were generated

    def has(self, need: Need) -> bool:
        """Tell whether the sample has what a metric needs. The real video is not part of a sample and isn't checked."""
        return {
            "caption": bool(self.caption), "fps": self.fps > 0, "scene": self.fields.get("scene") is not None,
            "part": self.part is not None, "real": True,
        }[need]  # fmt: skip


Figures = Callable[[np.ndarray, np.ndarray | None, Sample], dict[str, float]]


@dataclass(frozen=True)
class Metric:
    """A metric of single videos: `figures(made_THWC, real_THWC, sample)` returns values by name, NaN for none."""

    name: str
    figures: Figures
    better: Better
    needs: frozenset[Need] = frozenset()  # a video without these gets no figure
    summary: Summary = "mean"
    chance: Mapping[str, float] = field(default_factory=dict)  # figures of random guessing, if known


@dataclass(frozen=True)
class Distance:
    """Distances between two sets of videos; less is better.

    `features(video_THWC, sample)` returns the features `(D,)` of one video. `distances(made_ND, real_ND)` returns the
    distances by name, the main one first, for equal numbers of generated and real videos.
    """

    name: str
    features: Callable[[np.ndarray, Sample], np.ndarray]
    distances: Callable[[np.ndarray, np.ndarray], dict[str, float]]
    needs: frozenset[Need] = frozenset()


Models = Mapping[str, str]  # local folders or files of networks, by the name under which metrics look them up
Build = Callable[[Models], Metric | Distance]


class Unavailable(Exception):
    """A library or network that a metric needs is missing; the message names it and tells how to get it."""


@dataclass(frozen=True)
class Entry:
    """A registered metric; `build` raises Unavailable if a library or a network is missing."""

    name: str
    groups: tuple[str, ...]
    build: Build


METRICS: dict[str, Entry] = {}
GROUPS = {
    "quick": "no network, a fraction of a second a video",
    "full": "everything for which libraries and networks are at hand",
    "completion": "for clips completed from some of their own frames",
}


def register(name: str, groups: Sequence[str], build: Build) -> None:
    """Register a metric. Raises ValueError if the name is taken."""
    if name in METRICS or name in GROUPS:
        raise ValueError(f"there is a metric or group {name!r} already")
    METRICS[name] = Entry(name, tuple(groups), build)


def metric(
    name: str,
    groups: Sequence[str],
    better: Better,
    needs: Sequence[Need] = (),
    summary: Summary = "mean",
    chance: Mapping[str, float] | None = None,
) -> Callable[[Figures], Figures]:
    """Decorate a function that computes the figures of one video, to register it as the metric `name`.

    Args:
        name: Name of the metric.
        groups: Groups that contain it, keys of `GROUPS`.
        better: Direction of improvement.
        needs: Facts without which a sample gets no figure.
        summary: How the figures of several videos are summarised.
        chance: Figures of random guessing, if known.
    """

    def enter(function: Figures) -> Figures:
        built = Metric(name, function, better, frozenset(needs), summary, chance or {})
        register(name, groups, lambda models: built)
        return function

    return enter
