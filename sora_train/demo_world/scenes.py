"""The demo world: scenes of moving shapes, and their captions.

Lengths are in shorter sides of the frame, so a scene looks the same at any resolution. What a scene shows of
(colour, shape, direction) is split by colour, shape and *axis* of movement, because an object that leaves and comes
back moves both ways along its axis: no movement of a split's objects occurs in another.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 45, 45),
    "yellow": (220, 205, 45),
    "green": (50, 180, 65),
    "cyan": (50, 195, 210),
    "blue": (55, 75, 220),
    "purple": (195, 55, 205),
}
SHAPES = ("ring", "square", "triangle", "cross")  # a disc is too near to a square for small models
DIRECTIONS: dict[str, tuple[int, int]] = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
SPLITS = ("train", "val", "test")  # to learn from, to choose by, to report
# shares of the scenes in training, and in a held-out split, where there are enough of each to judge
KINDS = {"one": 0.35, "two": 0.25, "behind": 0.15, "return": 0.18, "image": 0.02, "pair": 0.05}
HELD_OUT_KINDS = {"one": 0.45, "two": 0.2, "behind": 0.15, "return": 0.15, "image": 0.05}
SIZES = {"small": 0.22, "large": 0.32}  # radius
SPEEDS = {"slow": 0.14, "quick": 0.24}  # shorter sides a second
BACKGROUNDS = {"dark": 28, "grey": 118, "light": 225}
FRAME_SIZES = (*3 * ((96, 96), (64, 64)), (80, 160), (160, 80))  # height, width; a quarter isn't square
FRAMES = ((9, 8), (17, 8), (17, 8), (33, 16))  # frames, frames a second
STILL = "still"  # direction and speed of what doesn't move

_GAP = 0.03  # between objects, and between an object and the frame's edge
_HELD_OUT_EVERY = 6  # one in this many combinations is only in the val split, and another only in the test split
_REMAINDER = {"val": 0, "test": 3}  # of a combination's number; every colour, shape and direction is in all splits
_TWO_SECONDS = ((17, 8), (33, 16))  # for what must be seen from beginning to end
_SPREAD = 0.1  # share of its free room over which an object's place varies; the rest is kept on both sides
_AWAY = (0.3, 0.7)  # an object that returns, or passes behind another, is out of sight between these parts of the clip

_VERBS = {
    "slow": ("drifts", "glides slowly", "moves slowly", "creeps", "floats gently"),
    "quick": ("rushes", "moves quickly", "darts", "speeds", "races"),
}
_WAYS = {
    "left": ("left", "to the left", "leftwards", "from right to left"),
    "right": ("right", "to the right", "rightwards", "from left to right"),
    "up": ("up", "upwards", "from bottom to top"),
    "down": ("down", "downwards", "from top to bottom"),
}
_SIDES = {"left": "on the left", "right": "on the right", "up": "at the top", "down": "at the bottom"}
_GROUNDS = {
    "dark": ("over a dark field", "on a dark background", "in the dark"),
    "grey": ("over a grey field", "on a grey background"),
    "light": ("over a light field", "on a light background", "over a pale field"),
}

Combination = tuple[str, str, str]  # colour, shape, direction


@dataclass(frozen=True)
class Thing:
    """One object: what it is, and the path of its centre as (time 0..1, y, x) corners."""

    colour: str
    shape: str
    size: str
    direction: str
    speed: str
    path: tuple[tuple[float, float, float], ...]


@dataclass(frozen=True)
class Scene:
    """Everything a rendering needs; later things are drawn over earlier ones. Frames a second are 0 for an image."""

    kind: str
    background: str
    height: int
    width: int
    frames: int
    fps: int
    things: tuple[Thing, ...]

    @property
    def seconds(self) -> float:
        """From the first frame to the last."""
        return (self.frames - 1) / self.fps if self.fps else 0.0


def combinations(split: str) -> list[Combination]:
    """(colour, shape, direction) of one split; both directions along an axis are in the same split."""
    split_of = {remainder: name for name, remainder in _REMAINDER.items()}
    indexed = product(enumerate(COLOURS), enumerate(SHAPES), DIRECTIONS)
    return [
        (colour, shape, direction)
        for (i, colour), (j, shape), direction in indexed
        if split_of.get((i + 2 * j + 3 * _axis(direction)) % _HELD_OUT_EVERY, "train") == split
    ]


def make_scene(rng: np.random.Generator, split: str, kind: str | None = None) -> Scene:
    """Draw a scene of `kind` (of any kind if None); every movement in it belongs to the split asked for."""
    shares = KINDS if split == "train" else HELD_OUT_KINDS
    kind = kind or str(rng.choice(list(shares), p=list(shares.values())))
    oblong = [(height, width) for height, width in FRAME_SIZES if height != width]
    height, width = _pick(rng, oblong if kind == "behind" else FRAME_SIZES)
    frames, fps = _pick(rng, _TWO_SECONDS if kind in ("behind", "return") else FRAMES)
    if kind in ("image", "pair"):
        frames, fps = 1, 0
    scene = Scene(kind, _pick(rng, list(BACKGROUNDS)), height, width, frames, fps, ())
    area = np.array([height, width]) / min(height, width)
    choices = combinations(split)
    if kind == "behind":  # there is room beside a large object along the longer side only
        choices = [c for c in choices if _axis(c[2]) == int(width > height)]
    first = _pick(rng, choices)
    second = _pick(rng, [c for c in choices if c[0] != first[0] and _axis(c[2]) == _axis(first[2])])
    if kind == "image":
        things = _still(rng, area, first)
    elif kind == "behind":
        things = _behind(rng, area, first, second[0], scene.seconds)
    elif kind == "return":
        things = _returning(rng, area, first)
    elif kind in ("two", "pair"):
        things = _two(rng, area, first, second, scene.seconds)
    else:
        things = _one(rng, area, first, scene.seconds)
    return Scene(kind, scene.background, height, width, frames, fps, things)


def captions(scene: Scene, rng: np.random.Generator) -> dict[str, str]:
    """Four wordings of a scene by name: plain, scene_first, described, note.

    Each describes everything, because what a caption leaves out becomes noise in the loss, and the background is the
    largest part of a frame. In runs of minutes on an earlier version, direction was learned with full captions only,
    and not if some captions left the background out.
    """
    first, ground = scene.things[0], _GROUNDS[scene.background]
    if scene.kind in ("image", "pair"):
        name, other = _name(first), ""
        if scene.kind == "pair":
            other = f" and {_beside(scene)} a {_name(scene.things[1])}"
        return {
            "plain": f"a picture of a {name}{other} {_pick(rng, ground)}",
            "scene_first": f"{_pick(rng, ground)}, a {name}{other}",
            "described": f"a still image: a {first.colour} {first.shape}, {first.size},{other} {_pick(rng, ground)}",
            "note": f"{name}{other}, {_pick(rng, ground)}",
        }
    actions = [_action(scene, rng) for _ in range(4)]
    return {
        "plain": f"a {_name(first)} {actions[0]} {_pick(rng, ground)}",
        "scene_first": f"{_pick(rng, ground)}, a {_name(first)} {actions[1]}",
        "described": f"a video of a {first.colour} {first.shape} that is {first.size} and {actions[2]} "
        f"{_pick(rng, ground)}",
        "note": f"{_name(first)} {actions[3]}, {_pick(rng, ground)}",
    }


def describe(scene: Scene, texts: dict[str, str]) -> dict[str, Any]:
    """Fields of a sample's json: captions by name, and the scene by its attributes, for evaluation."""
    keys = ("colour", "shape", "size", "direction", "speed")
    things = [{key: getattr(thing, key) for key in keys} for thing in scene.things]
    return {
        "captions": texts,
        "scene": {"kind": scene.kind, "background": scene.background, "things": things},
        "fps": scene.fps,
        "width": scene.width,
        "height": scene.height,
        "frames": scene.frames,
    }


def _pick(rng: np.random.Generator, options: Any) -> Any:
    return options[int(rng.integers(len(options)))]


def _axis(direction: str) -> int:
    """0 for up and down, 1 for left and right: the index of the coordinate that changes."""
    return int(DIRECTIONS[direction][1] != 0)


def _straight(what: Combination, size: str, speed: str, start: np.ndarray, end: np.ndarray) -> Thing:
    path = ((0.0, float(start[0]), float(start[1])), (1.0, float(end[0]), float(end[1])))
    return Thing(what[0], what[1], size, what[2], speed, path)


def _near_middle(rng: np.random.Generator) -> float:
    """A place in the room that is free, 0 to 1: near the middle, so that few examples teach where things are."""
    return 0.5 + _SPREAD * (rng.random() - 0.5)


def _crossing(
    rng: np.random.Generator, area: np.ndarray, what: Combination, seconds: float, size: str, across: float
) -> Thing:
    """An object that stays fully in the frame and moves one way; `across` is its centre on the other axis."""
    axis, step = _axis(what[2]), sum(DIRECTIONS[what[2]])
    room = area[axis] - 2 * (SIZES[size] + _GAP)
    speed = _pick(rng, [name for name, pace in SPEEDS.items() if pace * seconds <= room])
    reach = SPEEDS[speed] * seconds
    low = SIZES[size] + _GAP + _near_middle(rng) * (room - reach)
    start, end = np.full(2, across), np.full(2, across)
    start[axis], end[axis] = (low, low + reach) if step > 0 else (low + reach, low)
    return _straight(what, size, speed, start, end)


def _resting(
    rng: np.random.Generator, area: np.ndarray, what: Combination, seconds: float, size: str, across: float
) -> Thing:
    """An object of an image in its lane."""
    axis, place = _axis(what[2]), np.full(2, across)
    margin = SIZES[size] + _GAP
    place[axis] = margin + _near_middle(rng) * (area[axis] - 2 * margin)
    return _straight((what[0], what[1], STILL), size, STILL, place, place)


def _one(rng: np.random.Generator, area: np.ndarray, what: Combination, seconds: float) -> tuple[Thing, ...]:
    size = _pick(rng, list(SIZES))
    margin = SIZES[size] + _GAP
    across = margin + _near_middle(rng) * (area[1 - _axis(what[2])] - 2 * margin)
    return (_crossing(rng, area, what, seconds, size, across),)


def _two(
    rng: np.random.Generator, area: np.ndarray, first: Combination, second: Combination, seconds: float
) -> tuple[Thing, ...]:
    """Two objects along one axis, in separate lanes, so that they never meet; at rest in an image."""
    across = area[1 - _axis(first[2])]
    sizes = [(a, b) for a, b in product(SIZES, SIZES) if 2 * (SIZES[a] + SIZES[b]) + 3 * _GAP <= across]
    lanes = list(zip((first, second), _pick(rng, sizes), strict=True))
    order = rng.permutation(2)
    slack = across - 3 * _GAP - 2 * sum(SIZES[size] for _, size in lanes)
    extra = np.sort(rng.random(2)) * slack  # how much of it lies before the upper lane, and before the lower
    things: list[Thing] = []
    edge = _GAP
    for place, shift in zip(order, extra, strict=True):
        what, size = lanes[place]
        lane = edge + shift + SIZES[size]
        things.append((_crossing if seconds else _resting)(rng, area, what, seconds, size, lane))
        edge += 2 * SIZES[size] + _GAP
    return tuple(things[int(i)] for i in np.argsort(order))


def _behind(
    rng: np.random.Generator, area: np.ndarray, what: Combination, colour: str, seconds: float
) -> tuple[Thing, ...]:
    """A small object passes behind a large square that doesn't move, and is hidden for a moment."""
    axis, step = _axis(what[2]), np.array(DIRECTIONS[what[2]])
    middle = area / 2
    middle[1 - axis] += (_near_middle(rng) - 0.5) * (area[1 - axis] - 2 * (SIZES["large"] + _GAP))
    reach = area[axis] / 2 - SIZES["small"] - _GAP
    speed = min(SPEEDS, key=lambda name: abs(SPEEDS[name] - reach / (_AWAY[0] * seconds)))
    places = (middle - step * reach, middle, middle, middle + step * reach)
    mover = Thing(what[0], what[1], "small", what[2], speed, _corners(places))
    return mover, _straight((colour, "square", STILL), "large", STILL, middle, middle)


def _returning(rng: np.random.Generator, area: np.ndarray, what: Combination) -> tuple[Thing, ...]:
    """An object leaves the frame the way it faces and comes back where it left."""
    axis, step, size = _axis(what[2]), np.array(DIRECTIONS[what[2]]), _pick(rng, list(SIZES))
    margin = SIZES[size] + _GAP
    inside = margin + np.array([_near_middle(rng), _near_middle(rng)]) * (area - 2 * margin)
    inside[axis] = area[axis] / 2 + step[axis] * (area[axis] / 2 - 0.5)  # half a side from where it leaves
    outside = inside + step * (0.5 + SIZES[size] + 2 * _GAP)
    return (Thing(what[0], what[1], size, what[2], "quick", _corners((inside, outside, outside, inside))),)


def _corners(places: tuple[np.ndarray, ...]) -> tuple[tuple[float, float, float], ...]:
    """The path of an object that is at four places at the beginning, from and to its absence, and at the end."""
    return tuple((t, float(y), float(x)) for t, (y, x) in zip((0.0, *_AWAY, 1.0), places, strict=True))


def _still(rng: np.random.Generator, area: np.ndarray, what: Combination) -> tuple[Thing, ...]:
    size = _pick(rng, list(SIZES))
    margin = SIZES[size] + _GAP
    place = margin + np.array([_near_middle(rng), _near_middle(rng)]) * (area - 2 * margin)
    return (_straight((what[0], what[1], STILL), size, STILL, place, place),)


def _name(thing: Thing) -> str:
    return f"{thing.size} {thing.colour} {thing.shape}"


def _action(scene: Scene, rng: np.random.Generator) -> str:
    """Action of a scene, as words that follow the name of the first object."""
    first = scene.things[0]
    if scene.kind == "return":
        side = _SIDES[first.direction]
        return str(_pick(rng, (f"leaves the frame {side} and comes back", f"goes out of sight {side}, then returns")))
    action = f"{_pick(rng, _VERBS[first.speed])} {_pick(rng, _WAYS[first.direction])}"
    if scene.kind == "behind":
        return f"{action} and passes behind a {_name(scene.things[1])}"
    if scene.kind == "two":
        second = scene.things[1]
        action += f" while {_beside(scene)} a {_name(second)}"
        action += f" {_pick(rng, _VERBS[second.speed])} {_pick(rng, _WAYS[second.direction])}"
    return action


def _beside(scene: Scene) -> str:
    """Side of the first of two objects on which the second one is."""
    (_, y, x), (_, other_y, other_x) = (thing.path[0] for thing in scene.things)
    lanes = {thing.direction for thing in scene.things}
    if lanes & {"left", "right"} or (lanes == {STILL} and abs(other_y - y) > abs(other_x - x)):
        return "below it" if other_y > y else "above it"
    return "to the right of it" if other_x > x else "to the left of it"
