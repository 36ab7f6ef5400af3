"""Each task is a mask over latent frames, and always leaves something to generate."""

from __future__ import annotations

import pytest

from sora_train.config.schema import TASKS
from sora_train.flow.tasks import given_frames


@pytest.mark.parametrize(
    ("task", "mask"),
    [
        ("text_to_video", [False] * 5),
        ("image", [False] * 5),
        ("image_to_video", [True] + [False] * 4),
    ],
)
def test_masks(task: str, mask: list[bool]) -> None:
    assert given_frames(task, 5, seed=3) == mask


def test_an_extension_is_given_any_number_of_first_frames_evenly() -> None:
    masks = [given_frames("extension", 5, seed) for seed in range(2000)]
    assert all(mask == sorted(mask, reverse=True) for mask in masks), "the given frames come first"
    counts = [sum(mask.count(True) == n for mask in masks) for n in range(6)]
    assert counts[0] == counts[5] == 0
    assert all(430 < count < 570 for count in counts[1:5])


def test_backwards_the_end_is_given_between_both_ends_and_of_frames_any_few() -> None:
    def masks(task: str) -> list[list[bool]]:
        return [given_frames(task, 6, seed) for seed in range(600)]

    assert all(mask == sorted(mask) and mask[-1] for mask in masks("extension_backwards"))
    between = masks("interpolation")
    for mask in between:
        gap = [place for place, given in enumerate(mask) if not given]
        assert mask[0] and mask[-1] and gap == list(range(gap[0], gap[-1] + 1))
    assert len({tuple(mask) for mask in between}) == 10  # every gap inside
    few = masks("frames")
    assert {mask.count(True) for mask in few} == {1, 2, 3}
    assert all(240 > sum(mask[place] for mask in few) > 160 for place in range(6)), "each place as often: a third"


def test_memory_is_given_the_first_frame_and_an_overlap_after_a_gap_and_makes_the_last() -> None:
    five = {tuple(given_frames("memory", 5, seed)) for seed in range(200)}
    assert five == {
        (True, False, True, False, False), (True, False, False, True, False), (True, False, True, True, False),
    }  # fmt: skip
    assert given_frames("memory", 4, 7) == [True, False, True, False]
    assert given_frames("memory", 3, 7) == [True, False, False], "as image_to_video"


@pytest.mark.parametrize("task", TASKS)
def test_every_configurable_task_is_known_and_generates_something(task: str) -> None:
    for frames in (1, 2, 3, 9):
        for seed in range(20):
            mask = given_frames(task, frames, seed)
            assert len(mask) == frames and not all(mask)
            assert mask == given_frames(task, frames, seed)


def test_an_unknown_task_is_an_error() -> None:
    with pytest.raises(KeyError, match="inpainting"):
        given_frames("inpainting", 5, 0)
