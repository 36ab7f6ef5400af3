"""The judge says yes to the demo world's own videos, also at the size the demo trains at, and no to wrong ones."""

from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from sora_train.demo_world.detect import sight
from sora_train.demo_world.judge import judge
from sora_train.demo_world.render import render
from sora_train.demo_world.scenes import COLOURS, SHAPES, Scene, Thing, make_scene

KINDS = ("one", "two", "behind", "return", "image")


def scenes(kind: str, count: int) -> list[Scene]:
    rng = np.random.default_rng(11)
    return [make_scene(rng, "val", kind) for _ in range(count)]


def small(video_THWC: np.ndarray, scene: Scene) -> np.ndarray:
    """The video at about 1024 pixels a frame, as the demo's model sees it."""
    video = video_THWC[:: 2 if scene.fps == 16 else 1]
    video = video[: 1 + (len(video) - 1) // 4 * 4]
    height, width = video.shape[1:3]
    size = (32, 32) if height == width else (40, 24) if width > height else (24, 40)
    return np.stack([np.asarray(Image.fromarray(f).resize(size, Image.Resampling.BICUBIC)) for f in video])


def judged(scene: Scene, shown: Scene | None = None) -> dict[str, bool]:
    """The verdict on a small video of `shown` (of the scene itself if not given)."""
    return judge(small(render(shown or scene), scene), asdict(scene))


def with_first(scene: Scene, **changes: Any) -> Scene:
    return replace(scene, things=(replace(scene.things[0], **changes), *scene.things[1:]))


def other(value: str, values: object) -> str:
    """Another value of the vocabulary."""
    known = list(values)  # type: ignore[call-overload]
    return str(known[(known.index(value) + 1) % len(known)])


def late(scene: Scene, **changes: str) -> np.ndarray:
    """A small video whose first object turns into another in the middle."""
    first, second = (small(render(s), scene) for s in (scene, with_first(scene, **changes)))
    return np.concatenate([first[: len(first) // 2], second[len(first) // 2 :]])


@pytest.mark.parametrize("kind", KINDS)
def test_real_videos_are_right_at_the_size_the_demo_trains_at(kind: str) -> None:
    verdicts = [judged(scene) for scene in scenes(kind, 4)]
    assert all(all(v.values()) for v in verdicts), verdicts


@pytest.mark.parametrize("kind", KINDS)
def test_real_videos_are_right_at_their_own_size(kind: str) -> None:
    scene = scenes(kind, 1)[0]
    assert all(judge(render(scene), asdict(scene)).values())


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_blur_that_takes_the_tips_away_hides_no_shape(shape: str, colour: str) -> None:
    thing = Thing(colour, shape, "small", "still", "still", ((0.0, 0.5, 0.8), (1.0, 0.5, 0.8)))
    scene = Scene("image", "grey", 36, 60, 1, 0, (thing,))
    frame = ndimage.gaussian_filter(render(scene)[0].astype(np.float64), (1.8, 1.8, 0)).astype(np.uint8)
    assert [(s.colour, s.shape) for s in sight(frame)] == [(colour, shape)]


@pytest.mark.parametrize("kind", KINDS)
def test_noise_and_nothing_are_wrong_in_everything(kind: str) -> None:
    scene = scenes(kind, 1)[0]
    noise = np.random.default_rng(0).integers(0, 256, (17, 32, 32, 3), dtype=np.uint8)
    assert not any(judge(noise, asdict(scene)).values())
    assert not any(judge(np.full_like(noise, 120), asdict(scene)).values())


def test_wrong_colour_shape_and_direction_are_told_apart() -> None:
    for scene in scenes("one", 4):
        thing = scene.things[0]
        recoloured = with_first(scene, colour=other(thing.colour, COLOURS))
        assert judged(scene, recoloured) == {"colour": False, "shape": True, "direction": True}
        reshaped = with_first(scene, shape=other(thing.shape, SHAPES))
        assert judged(scene, reshaped) == {"colour": True, "shape": False, "direction": True}
        backwards = small(render(scene), scene)[::-1]
        assert judge(backwards, asdict(scene)) == {"colour": True, "shape": True, "direction": False}


def test_static_and_jumping_objects_have_no_direction() -> None:
    for scene in scenes("one", 3):
        video = small(render(scene), scene)
        still = np.repeat(video[:1], len(video), axis=0)
        jump = np.where(np.arange(len(video))[:, None, None, None] < len(video) // 2, video[:1], video[-1:])
        for wrong in (still, jump):
            assert judge(wrong, asdict(scene)) == {"colour": True, "shape": True, "direction": False}


def test_object_that_turns_into_another_is_wrong() -> None:
    for scene in scenes("one", 3):
        thing = scene.things[0]
        turned = late(scene, colour=other(thing.colour, COLOURS), shape=other(thing.shape, SHAPES))
        verdict = judge(turned, asdict(scene))  # its centre may jump, so the direction may be lost too
        assert not verdict["colour"] and not verdict["shape"]


@pytest.mark.parametrize("kind", ["return", "behind"])
def test_identity_is_lost_by_another_colour_or_shape_afterwards_or_no_passage(kind: str) -> None:
    for scene in scenes(kind, 2):
        thing = scene.things[0]
        colours = [c for c in COLOURS if c not in {t.colour for t in scene.things}]
        assert judge(late(scene, colour=colours[0]), asdict(scene)) == {"identity": False}
        assert judge(late(scene, shape=other(thing.shape, SHAPES)), asdict(scene)) == {"identity": False}
        video = small(render(scene), scene)
        still = np.repeat(video[:1], len(video), axis=0)
        assert judge(still, asdict(scene)) == {"identity": False}


def test_passing_in_front_or_turning_back_is_not_passing_behind() -> None:
    scene = scenes("behind", 1)[0]
    in_front = replace(scene, things=scene.things[::-1])
    video = small(render(scene), scene)
    turns_back = np.concatenate([video[: len(video) // 2], video[: len(video) // 2][::-1]])
    assert judged(scene, in_front) == {"identity": False}
    assert judge(turns_back, asdict(scene)) == {"identity": False}


def test_two_objects_need_both() -> None:
    for scene in scenes("two", 3):
        assert judged(scene, replace(scene, things=scene.things[:1])) == {"two_objects": False}
        first, second = scene.things
        swapped = (replace(first, colour=second.colour), replace(second, colour=first.colour))
        expected = first.shape == second.shape  # then the swap changes nothing that is asked for
        assert judged(scene, replace(scene, things=swapped)) == {"two_objects": expected}


def test_wrong_input_is_refused() -> None:
    scene = asdict(scenes("one", 1)[0])
    with pytest.raises(ValueError, match="uint8"):
        judge(np.zeros((3, 32, 32, 3), np.float32), scene)
    with pytest.raises(ValueError, match="kind 'x'"):
        judge(np.zeros((3, 32, 32, 3), np.uint8), {**scene, "kind": "x"})
