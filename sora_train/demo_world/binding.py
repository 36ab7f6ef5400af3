"""BindingBench: does a video model give the right attributes to the right objects, in the right places and order?

Scenes of one, two and three moving objects in eight categories. A scene's degree is the number of its objects whose
(colour, shape, axis of movement) never occurs in the demo world's training clips: degree 0 tests known combinations, a
higher degree new ones. "attribute", "two", "return" and "occlusion" use the demo world's kinds of scene and wording;
"three", "relation", "count" and "order" are kinds that it doesn't contain. All marks are computed from pixels without
a learned network, so any model that writes videos can be judged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sora_train.core.seeds import hash64
from sora_train.demo_world.scenes import (
    BACKGROUNDS,
    DIRECTIONS,
    SIZES,
    SPEEDS,
    Combination,
    Scene,
    Thing,
    captions,
    combinations,
    describe,
    make_scene,
)

FRAMES, FPS = 17, 8  # two seconds
_SQUARE = (96, 96)  # height, width
_LANES = {1: (80, 160), 0: (160, 80)}  # height, width for lanes side by side, and one above the other
_GAP = 0.03  # between objects and at the frame's edge, in shorter sides
_SIDES = {1: ("to the left of", "to the right of"), 0: ("above", "below")}
_NUMBERS = {2: "two", 3: "three"}
_GONE, _THERE = 0.42, 0.58  # parts of the clip at which the first object of an order is gone and the second comes


@dataclass(frozen=True)
class Trial:
    """One prompt of the benchmark with the scene that a right video shows."""

    name: str
    category: str
    degree: int
    caption: str
    scene: Scene

    def row(self) -> dict[str, Any]:
        """The trial as a line of the prompt file."""
        known = describe(self.scene, {})
        return {
            "video": self.name, "prompt": self.caption, "category": self.category, "degree": self.degree,
            "seconds": self.scene.seconds, "height": self.scene.height, "width": self.scene.width,
            "scene": known["scene"],
        }  # fmt: skip


Make = Callable[[np.random.Generator, int], tuple[Scene, str]]


def trials(each: int, seed: int = 0) -> Iterator[Trial]:
    """`each` trials of every category and degree; the same arguments give the same trials."""
    for category, (make, objects) in CATEGORIES.items():
        for degree in range(objects + 1):
            for number in range(each):
                words = [ord(letter) for letter in category]
                rng = np.random.default_rng(int(hash64(seed, degree, number, *words)))
                scene, caption = make(rng, degree)
                yield Trial(f"{category}-{degree}-{number:04d}", category, degree, caption, scene)


def _from_demo(kind: str) -> Make:
    """A kind of the demo world itself, whose movements are all held out or none."""

    def make(rng: np.random.Generator, degree: int) -> tuple[Scene, str]:
        while True:
            scene = make_scene(rng, "test" if degree else "train", kind)
            if scene.frames == FRAMES:
                return scene, captions(scene, rng)["plain"]

    return make


def _two(rng: np.random.Generator, degree: int) -> tuple[Scene, str]:
    """Two different objects, each in a lane of its own, in the demo world's wording."""
    axis, whats = _draw(rng, 2, degree)
    scene = _in_lanes(rng, "two", axis, whats)
    scene = replace(scene, things=tuple(_shuffled(rng, scene.things)))
    return scene, captions(scene, rng)["plain"]


def _three(rng: np.random.Generator, degree: int) -> tuple[Scene, str]:
    """Three different objects, each in a lane of its own."""
    axis, whats = _draw(rng, 3, degree)
    scene = _in_lanes(rng, "three", axis, whats)
    one, two, three = (f"a {_name(t)} moves {t.direction}" for t in _shuffled(rng, scene.things))
    return scene, f"{one} while {two} and {three} {_ground(scene)}"


def _relation(rng: np.random.Generator, degree: int) -> tuple[Scene, str]:
    """Two objects that move alike, one beside or above the other."""
    axis, whats = _draw(rng, 2, degree, together=True)
    scene = _in_lanes(rng, "relation", axis, whats)
    before, behind = _SIDES[1 - axis]
    first, second = scene.things
    told = (first, before, second) if rng.random() < 0.5 else (second, behind, first)
    return scene, f"a {_name(told[0])} {told[1]} a {_name(told[2])}, both moving {first.direction}, {_ground(scene)}"


def _count(rng: np.random.Generator, degree: int) -> tuple[Scene, str]:
    """Two or three objects that look and move alike."""
    axis, whats = _draw(rng, 1, degree)
    number = int(rng.integers(2, 4))
    scene = _in_lanes(rng, "count", axis, whats * number)
    name = _name(scene.things[0])
    plural = f"{name}es" if name.endswith("s") else f"{name}s"
    return scene, f"{_NUMBERS[number]} {plural} move {whats[0][2]} {_ground(scene)}"


def _order(rng: np.random.Generator, degree: int) -> tuple[Scene, str]:
    """An object leaves the frame, then another comes in."""
    axis, whats = _draw(rng, 2, degree, together=True)
    height, width = _SQUARE
    step = np.array(DIRECTIONS[whats[0][2]])
    middle, outside = np.array([0.5, 0.5]), 0.5 + SIZES["small"] + 2 * _GAP
    things = []
    ways = (
        ((0.0, 0.0), (_GONE, 1.0), (1.0, 1.0)),
        ((0.0, -1.0), (_THERE, -1.0), (1.0, 0.0)),
    )  # time, way from the middle
    for what, corners in zip(whats, ways, strict=True):
        path = tuple((t, *(middle + way * step * outside).tolist()) for t, way in corners)
        things.append(Thing(what[0], what[1], "small", what[2], "quick", path))
    scene = _scene(rng, "order", height, width, tuple(things))
    first, second = things
    words = f"first a {_name(first)} leaves the frame {first.direction}, then a {_name(second)} comes in"
    return scene, f"{words} {_ground(scene)}"


CATEGORIES: dict[str, tuple[Make, int]] = {  # how a scene is made, and how many of its objects may be held out
    "attribute": (_from_demo("one"), 1),
    "two": (_two, 2),
    "three": (_three, 3),
    "relation": (_relation, 2),
    "count": (_count, 1),
    "order": (_order, 2),
    "return": (_from_demo("return"), 1),
    "occlusion": (_from_demo("behind"), 1),
}


def _draw(rng: np.random.Generator, objects: int, degree: int, together: bool = False) -> tuple[int, list[Combination]]:
    """Draw the axis of all movements, and objects of different colours, `degree` of them with held-out combinations.

    With `together` all objects move in one direction.
    """
    while True:
        axis = int(rng.integers(2))
        held = rng.permutation([True] * degree + [False] * (objects - degree))
        whats: list[Combination] = []
        for is_held in held:
            choices = [c for c in combinations("test" if is_held else "train") if int(DIRECTIONS[c[2]][1] != 0) == axis]
            choices = [c for c in choices if c[0] not in {w[0] for w in whats}]
            if together and whats:
                choices = [c for c in choices if c[2] == whats[0][2]]
            if choices:
                whats.append(choices[int(rng.integers(len(choices)))])
        if len(whats) == objects:
            return axis, whats


def _in_lanes(rng: np.random.Generator, kind: str, axis: int, whats: list[Combination]) -> Scene:
    """Small objects in parallel lanes, all at one speed.

    The frame is square if the lanes fit, so that a category tests no more than it names; otherwise it is twice as long
    across the lanes.
    """
    radius = SIZES["small"]
    needed = 2 * radius * len(whats) + _GAP * (len(whats) + 1)
    (height, width), across = (_SQUARE, 1.0) if needed <= 1 else (_LANES[1 - axis], 2.0)
    slack = across - needed
    shares = np.diff(np.concatenate(([0.0], np.sort(rng.random(len(whats))), [1.0])))[:-1]
    reach = SPEEDS["slow"] * (FRAMES - 1) / FPS
    low = 0.5 - reach / 2
    things, edge = [], 0.0
    for what, share in zip(whats, shares, strict=True):
        edge += _GAP + slack * share
        forth = sum(DIRECTIONS[what[2]]) > 0
        along = (low, low + reach) if forth else (low + reach, low)
        ends = [np.full(2, edge + radius) for _ in range(2)]
        for end, place in zip(ends, along, strict=True):
            end[axis] = place
        path = tuple((t, float(end[0]), float(end[1])) for t, end in zip((0.0, 1.0), ends, strict=True))
        things.append(Thing(what[0], what[1], "small", what[2], "slow", path))
        edge += 2 * radius
    return _scene(rng, kind, height, width, tuple(things))


def _scene(rng: np.random.Generator, kind: str, height: int, width: int, things: tuple[Thing, ...]) -> Scene:
    background = list(BACKGROUNDS)[int(rng.integers(len(BACKGROUNDS)))]
    return Scene(kind, background, height, width, FRAMES, FPS, things)


def _shuffled(rng: np.random.Generator, things: tuple[Thing, ...]) -> list[Thing]:
    return [things[int(i)] for i in rng.permutation(len(things))]


def _name(thing: Thing) -> str:
    return f"{thing.size} {thing.colour} {thing.shape}"


def _ground(scene: Scene) -> str:
    return f"over a {scene.background} field"
