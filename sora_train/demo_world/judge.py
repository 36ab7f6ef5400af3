"""Judges whether a video shows what its scene of the demo world says, with no learned part."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import comb

import numpy as np

from sora_train.demo_world.detect import Sighting, direction_of, shape_of, sight
from sora_train.demo_world.scenes import COLOURS, DIRECTIONS, SHAPES

Thing = Mapping[str, str]

# How often a model that never reads the caption, but makes a good video of the right kind, is judged right: it draws
# every attribute evenly. An identity is drawn once and kept, which is the most generous reading.
CHANCE: dict[str, float] = {
    "colour": 1 / len(COLOURS),
    "shape": 1 / len(SHAPES),
    "direction": 1 / len(DIRECTIONS),
    "two_objects": 1 / (comb(len(COLOURS), 2) * len(SHAPES) ** 2),  # two different colours, a shape for each
    "identity": 1 / (len(COLOURS) * len(SHAPES)),
    "three_objects": 1 / (comb(len(COLOURS), 3) * len(SHAPES) ** 3),
    "relation": 1 / (2 * comb(len(COLOURS), 2) * len(SHAPES) ** 2),  # and which of them comes first
    "count": 1 / (2 * len(COLOURS) * len(SHAPES)),  # two or three
    "order": 1 / (len(COLOURS) * (len(COLOURS) - 1) * len(SHAPES) ** 2),
}

_AGREE = 0.75  # of the frames that count must be right: with half, an object could turn into another
_SEEN = 0.5  # of all frames must count
_ALONE = 4.0  # the one object outweighs everything else in its frame this many times
_CLEAR = 0.85  # of the most pixels seen on that side of the gap: an object less visible than that is not judged
_STAGE = 0.1  # of all frames: the shortest appearance before or after a gap


def judge(frames_THWC: np.ndarray, scene: Mapping[str, object]) -> dict[str, bool]:
    """Tell whether a uint8 RGB video `(T, H, W, 3)` shows what its scene (the sample's metadata) says, by measure.

    Kind "one": colour, shape, direction. "image": colour, shape. "two": two_objects (colour and shape of both).
    "return": identity (right colour and shape before the object leaves and after it returns, absent in between).
    "behind": identity (the same before and after it passes behind the large object, which stays).
    "three": three_objects. "count": count (so many of that colour and shape, nothing else). "relation": relation (both
    objects, the first of them left of or above the other). "order": order (the first object alone, then the second).
    Raises ValueError for another kind, or frames that are not a uint8 RGB video.
    """
    if frames_THWC.ndim != 4 or frames_THWC.shape[-1] != 3 or frames_THWC.dtype != np.uint8 or not len(frames_THWC):
        raise ValueError(f"need uint8 frames (T, H, W, 3), got {frames_THWC.dtype} {frames_THWC.shape}")
    things: list[Thing] = list(scene["things"])  # type: ignore[call-overload]
    seen = [sight(frame) for frame in frames_THWC]
    kind = scene["kind"]
    if kind == "one":
        side = min(frames_THWC.shape[1:3])
        direction = direction_of([s for s in only_objects(seen) if s.whole], side)
        return {**_looks(seen, things[0]), "direction": direction == things[0]["direction"]}
    if kind == "image":
        return _looks(seen, things[0])
    if kind in ("two", "pair"):
        return {"two_objects": _both(seen, things)}
    if kind in ("three", "count"):
        return {"three_objects" if kind == "three" else "count": _both(seen, things)}
    if kind == "relation":
        return {"relation": _both(seen, things) and _in_place(seen, things)}
    if kind == "order":
        return {"order": _in_turn(seen, things)}
    if kind == "return":
        return {"identity": _survives(seen, things[0]) is not None}
    if kind == "behind":
        return {"identity": _passes_behind(seen, things[0], things[1])}
    raise ValueError(f"no measure for scenes of kind {kind!r}")


def _looks(seen: list[list[Sighting]], thing: Thing) -> dict[str, bool]:
    """Colour and shape of the single object, from the frames that show it completely."""
    whole = [s for s in only_objects(seen) if s.whole]
    enough = len(whole) >= _SEEN * len(seen)
    return {
        "colour": enough and _share(whole, lambda s: s.colour == thing["colour"]) >= _AGREE,
        "shape": enough and _share(whole, lambda s: s.shape == thing["shape"]) >= _AGREE,
    }


def only_objects(seen: list[list[Sighting]]) -> list[Sighting]:
    """The largest object of every frame that shows one object and little else."""
    return [f[0] for f in seen if f and f[0].pixels >= _ALONE * sum(s.pixels for s in f[1:])]


def _both(seen: list[list[Sighting]], things: list[Thing]) -> bool:
    """Tell whether most frames show exactly these things."""
    wanted = sorted((t["colour"], t["shape"]) for t in things)
    right = [f for f in seen if sorted((s.colour, s.shape) for s in f) == wanted]
    return len(right) >= _AGREE * len(seen)


def _in_place(seen: list[list[Sighting]], things: list[Thing]) -> bool:
    """Tell whether the first thing is left of the other, or above it where they move sideways, in most frames."""
    across = int(DIRECTIONS[things[0]["direction"]][1] == 0)  # the axis that they don't move along
    pairs = [[_largest(frame, thing["colour"]) for thing in things] for frame in seen]
    known = [(one, other) for one, other in pairs if one is not None and other is not None]
    right = [one for one, other in known if (one.y, one.x)[across] < (other.y, other.x)[across]]
    return len(right) >= _AGREE * len(seen)


def _in_turn(seen: list[list[Sighting]], things: list[Thing]) -> bool:
    """Tell whether the first thing is seen alone, then the second alone, each for a while and the first never again."""
    colours = [{s.colour for s in frame} for frame in seen]
    first, second = ([i for i, found in enumerate(colours) if found == {thing["colour"]}] for thing in things)
    shortest = max(1.0, _STAGE * len(seen))
    if min(len(first), len(second)) < shortest or len(first) + len(second) < _SEEN * len(seen):
        return False
    return first[-1] < second[0] and all(
        _is_thing([seen[i] for i in stage], thing) for stage, thing in zip((first, second), things, strict=True)
    )


def _survives(seen: list[list[Sighting]], thing: Thing) -> tuple[range, range] | None:
    """The frames before and after the time an object is absent, if it is the right one in both; else None."""
    start, stop = _gap(seen)
    before, after = range(start), range(stop, len(seen))
    shortest = max(1.0, _STAGE * len(seen))
    if start == stop or min(len(before), len(after)) < shortest:
        return None
    return (before, after) if all(_is_thing([seen[i] for i in stage], thing) for stage in (before, after)) else None


def _gap(seen: list[list[Sighting]]) -> tuple[int, int]:
    """The longest run of frames without an object that has objects on both sides; (0, 0) if there is none."""
    filled = [i for i, frame in enumerate(seen) if frame]
    runs = [(a + 1, b) for a, b in zip(filled, filled[1:], strict=False) if b - a > 1]
    return max(runs, key=lambda run: run[1] - run[0], default=(0, 0))


def _is_thing(stage: list[list[Sighting]], thing: Thing) -> bool:
    """Tell whether the single object of these frames has the thing's colour and shape.

    Frames that show an object completely are preferred. Frames in which far fewer pixels of it are visible than in
    another are ignored, because the shape of a partly hidden object is uncertain.
    """
    telling = [frame for frame in stage if any(s.whole for s in frame)] or [frame for frame in stage if frame]
    most = max((frame[0].pixels for frame in telling), default=0)
    telling = [frame for frame in telling if frame[0].pixels >= _CLEAR * most]
    alone = only_objects(telling)
    if not alone or len(alone) < _AGREE * len(telling):
        return False
    return shape_of(alone) == thing["shape"] and _share(alone, lambda s: s.colour == thing["colour"]) >= _AGREE


def _passes_behind(seen: list[list[Sighting]], mover: Thing, cover: Thing) -> bool:
    """Tell whether the mover vanishes behind the cover and comes out on the other side, and the cover stays."""
    covers = [_largest(frame, cover["colour"]) for frame in seen]
    stays = [s for s in covers if s is not None]
    clear = [s for s in stays if s.whole]  # nothing touches it
    if len(stays) < _AGREE * len(seen) or not clear or shape_of(clear) != cover["shape"]:
        return False
    others = [[s for s in frame if s is not one] for frame, one in zip(seen, covers, strict=True)]
    stages = _survives(others, mover)
    if stages is None:
        return False
    step = np.array(DIRECTIONS[mover["direction"]])
    middle = np.mean([(s.y, s.x) for s in stays], axis=0)
    before, after = (
        np.mean([step @ (np.array((s.y, s.x)) - middle) for s in only_objects([others[i] for i in stage])])
        for stage in stages
    )
    return bool(before < 0 < after)


def _largest(frame: list[Sighting], colour: str) -> Sighting | None:
    return next((s for s in frame if s.colour == colour), None)


def _share(sightings: list[Sighting], right: Callable[[Sighting], bool]) -> float:
    return sum(map(right, sightings)) / max(len(sightings), 1)
