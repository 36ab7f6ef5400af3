"""What is given of a clip, and the measures of its completion, on clips made for it."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pytest

from sora_train.core.cli import InputError
from sora_train.demo_world.render import render
from sora_train.demo_world.scenes import make_scene
from sora_train.evaluation.completion import part_of, standing_still
from sora_train.evaluation.metric import Part, Sample
from sora_train.evaluation.registry import choose


@pytest.mark.parametrize(
    ("task", "given"),
    [
        ("image_to_video", [0]), ("extension", [0, 1, 2]), ("extension_backwards", [5, 6, 7, 8]),
        ("interpolation", [0, 7, 8]),
    ],
)  # fmt: skip
def test_parts_are_whole_latent_frames(task: str, given: list[int]) -> None:
    part = part_of(task, 9, 2)
    assert part.given(9) == given
    assert sorted([*range(9)[part.made(9)], *given]) == list(range(9))


def test_another_task_is_answered_with_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean 'extension'"):
        part_of("extention", 9, 2)


def test_a_completion_is_judged_by_its_made_part_alone() -> None:
    """The real clip is right; one whose made part goes back again is wrong, and off by twice the way."""
    scene = replace(make_scene(np.random.default_rng(4), "val", "one"), height=64, width=64, frames=9, fps=4)
    real, part = render(scene), Part(5, 0)
    sample = Sample("clip", "a caption", 4.0, {"scene": asdict(scene)}, part)
    judges = choose(["completion"], {})
    back = np.concatenate((real[:5], real[3::-1]))
    still = standing_still(real, part)
    assert (still[:5] == real[:5]).all() and (still[5:] == real[4]).all()
    right, wrong, none = (judges.judge(video, real, sample).figures for video in (real, back, still))
    assert right["scene"] == {"colour": 1.0, "shape": 1.0, "direction": 1.0}
    assert wrong["scene"]["direction"] == 0.0
    assert right["path"]["path"] == 0.0 and right["given"]["given_db"] == wrong["given"]["given_db"] == float("inf")
    assert wrong["path"]["path"] == pytest.approx(2 * none["path"]["path"], rel=0.1) and none["path"]["path"] > 0.05
    assert right["seam"]["seam"] == pytest.approx(1.0, rel=0.2)


def test_a_held_frame_is_the_nearest_given_one() -> None:
    real = np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1)
    assert standing_still(real, Part(1, 2)).ravel().tolist() == [0, 0, 0, 3, 4]
    assert standing_still(real, Part(0, 2)).ravel().tolist() == [3, 3, 3, 3, 4]
