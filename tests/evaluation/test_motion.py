"""Where an object is and whether a video jumps, on videos made for it."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pytest

from sora_train.core.cli import InputError
from sora_train.demo_world.scenes import make_scene, render
from sora_train.evaluation.completion import TASKS, Part, figures_table, marks, measure, part_of, summary
from sora_train.evaluation.motion import changes, median_interval, path_error, seam_jumps, worst_place


def moving(step: int, frames: int = 9) -> np.ndarray:
    """A red square that goes `step` pixels to the right a frame over grey."""
    video = np.full((frames, 40, 60, 3), 100, np.uint8)
    for n in range(frames):
        video[n, 10:22, 4 + step * n : 16 + step * n] = (215, 45, 45)
    return video


def test_the_path_error_is_the_distance_of_centres_in_shorter_sides() -> None:
    real = moving(4)
    assert path_error(real, real) == 0.0
    shifted = np.roll(real, 8, axis=2)
    assert path_error(shifted, real) == pytest.approx(8 / 40, abs=0.01)
    lost = real.copy()
    lost[3:] = 100
    assert path_error(lost, real) == pytest.approx(6 / 9)
    assert np.isnan(path_error(real, np.full_like(real, 100)))
    with pytest.raises(ValueError, match="one shape"):
        path_error(real[:3], real)


def test_changes_are_mean_differences() -> None:
    video = np.zeros((3, 2, 2, 3), np.uint8)
    video[1], video[2, 0] = 10, 30
    assert changes(video).tolist() == [10.0, pytest.approx((20 + 10) / 2)]


def test_a_seam_counts_against_all_other_places() -> None:
    smooth = moving(3, 13)
    median, largest = seam_jumps(changes(smooth), [5, 9])
    assert median == pytest.approx(1.0) and largest == pytest.approx(1.0)
    jumping = smooth.copy()
    jumping[9:] = np.roll(jumping[9:], 12, axis=2)
    assert seam_jumps(changes(jumping), [9])[0] > 3 and seam_jumps(changes(jumping), [9])[1] > 3
    assert seam_jumps(changes(jumping), [5])[1] < 0.5  # the jump is elsewhere
    assert seam_jumps(np.zeros(3), [2])[0] == float("inf")
    assert np.isnan(seam_jumps(changes(smooth), [])[0])
    for seam in (0, 13):
        with pytest.raises(ValueError, match="seams"):
            seam_jumps(changes(smooth), [seam])


def test_a_jump_that_is_moved_away_from_the_seam_is_found() -> None:
    """Seams at 4, 7, 10 and 13: three places a piece; changes count from the first frame's."""
    seams = [4, 7, 10, 13]
    every = np.array([9.0, 9.0, 9.0, *3 * (1.0, 3.0, 2.0), 9.0, 9.0])
    assert worst_place(every, seams) == 3.0 / 1.5
    assert seam_jumps(every, seams)[0] < 1
    assert worst_place(np.array([9.0, 9.0, 9.0, *3 * (4.0, 2.0, 2.0), 4.0]), seams) == 2.0
    assert worst_place(np.ones(15), seams) == 1.0
    assert np.isnan(worst_place(np.ones(15), [4, 5, 6])) and np.isnan(worst_place(np.ones(15), [4]))


def test_the_interval_holds_the_median_and_narrows_with_more_values() -> None:
    rng = np.random.default_rng(3)
    few, many = (median_interval(rng.normal(5, 1, n).tolist()) for n in (20, 2000))
    for median, low, high in (few, many):
        assert low <= median <= high
    assert many[2] - many[1] < 0.3 * (few[2] - few[1]) and many[1] < 5 < many[2]
    assert median_interval([1.0, float("nan")])[0] == 1.0
    assert all(np.isnan(median_interval([])))


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


def test_a_completion_is_marked_by_its_made_part_alone() -> None:
    """The real clip is right; one whose made part goes back again is wrong, and off by twice the way."""
    scene = replace(make_scene(np.random.default_rng(4), "val", "one"), height=64, width=64, frames=9, fps=4)
    real, part = render(scene), Part(5, 0)
    back = np.concatenate((real[:5], real[3::-1]))
    assert all(marks([real], [asdict(scene)], part)[name] == (1, 1) for name in ("colour", "shape", "direction"))
    assert marks([back], [asdict(scene)], part)["direction"] == (0, 1)
    right, wrong = (measure(video, real, real, part) for video in (real, back))
    assert right["path"] == 0.0 and right["given_db"] == right["vae_db"] == wrong["given_db"] == float("inf")
    assert wrong["path"] == pytest.approx(2 * right["still"], rel=0.1) and right["still"] > 0.05
    assert right["seam"] == pytest.approx(1.0, rel=0.2)
    summed = summary({task: [right, wrong] for task in TASKS})
    assert figures_table(summed).row_count == len(TASKS) and summed["extension"]["path"][0] > 0
