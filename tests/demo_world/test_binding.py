"""BindingBench: right videos are right, wrong ones wrong, and degrees count what training never shows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from sora_train.demo_world.binding import CATEGORIES, Trial, trials
from sora_train.demo_world.judge import judge
from sora_train.demo_world.render import render
from sora_train.demo_world.scenes import COLOURS, DIRECTIONS, STILL, combinations

EVERY = list(trials(1))


def by_category(category: str) -> Trial:
    return next(trial for trial in EVERY if trial.category == category)


def test_the_same_trials_every_time_and_others_for_another_seed() -> None:
    assert [t.row() for t in trials(1)] == [t.row() for t in EVERY]
    assert [t.caption for t in trials(1, seed=1)] != [t.caption for t in EVERY]
    assert len(EVERY) == sum(objects + 1 for _, objects in CATEGORIES.values())
    assert len({t.name for t in trials(3)}) == 3 * len(EVERY)


@pytest.mark.parametrize("trial", EVERY, ids=lambda trial: trial.name)
def test_a_right_video_is_right(trial: Trial) -> None:
    verdict = judge(render(trial.scene), trial.row()["scene"])
    assert verdict and all(verdict.values()), (trial.caption, verdict)


@pytest.mark.parametrize("category", CATEGORIES)
def test_another_colour_is_wrong(category: str) -> None:
    trial = by_category(category)
    used = {thing.colour for thing in trial.scene.things}
    other = next(colour for colour in COLOURS if colour not in used)
    first, *rest = trial.scene.things
    wrong = replace(trial.scene, things=(replace(first, colour=other), *rest))
    assert not all(judge(render(wrong), trial.row()["scene"]).values())


def test_objects_on_each_others_side_are_wrong() -> None:
    trial = by_category("relation")
    first, second = trial.scene.things
    swapped = replace(trial.scene, things=(replace(first, path=second.path), replace(second, path=first.path)))
    assert judge(render(swapped), trial.row()["scene"]) == {"relation": False}


def test_one_too_many_or_too_few_is_wrong() -> None:
    trial = by_category("count")
    fewer = replace(trial.scene, things=trial.scene.things[1:])
    assert judge(render(fewer), trial.row()["scene"]) == {"count": False}


def test_the_other_order_is_wrong() -> None:
    trial = by_category("order")
    video = render(trial.scene)
    assert judge(video, trial.row()["scene"]) == {"order": True}
    assert judge(video[::-1], trial.row()["scene"]) == {"order": False}
    assert judge(np.concatenate((video, video)), trial.row()["scene"]) == {"order": False}


@pytest.mark.parametrize("trial", EVERY, ids=lambda trial: trial.name)
def test_the_degree_is_the_number_of_held_out_objects(trial: Trial) -> None:
    held = set(combinations("test"))
    moving = [t for t in trial.scene.things if t.direction != STILL]
    kinds = {(t.colour, t.shape, t.direction) for t in moving} if trial.category == "count" else moving
    found = [k if isinstance(k, tuple) else (k.colour, k.shape, k.direction) for k in kinds]
    assert sum(one in held for one in found) == trial.degree
    assert all(direction in DIRECTIONS for _, _, direction in found)


def test_captions_name_things_in_the_plural_where_they_are_counted() -> None:
    told = {caption for _, caption in (CATEGORIES["count"][0](np.random.default_rng(n), 0) for n in range(40))}
    assert any(" crosses move " in caption for caption in told)
    assert all(caption.startswith(("two small ", "three small ")) and "sss" not in caption for caption in told)
