"""Metrics go one way as damage grows, for the kinds of damage that they see; the whole table is a benchmark."""

from __future__ import annotations

import pytest

from benchmarks.metric_damage import DAMAGES, clips, ladder, steps_seen
from sora_train.evaluation.registry import choose

SEEN = {  # figure -> damages that it sees, with the direction it goes; it may be blind to all others
    "psnr_db": {"noise": -1, "blur": -1, "shuffle": -1, "freeze": -1, "repeats": -1},
    "ssim": {"noise": -1, "blur": -1, "shuffle": -1, "freeze": -1, "repeats": -1},
    "sharpness": {"noise": 1, "blur": -1},
    "contrast": {"noise": 1, "blur": -1},
    "colourfulness": {"noise": 1, "blur": -1},
    "brightness": {"noise": 1},
    "flicker": {"noise": 1, "blur": -1, "shuffle": 1, "freeze": -1},
    "jerk": {"noise": 1, "shuffle": 1, "freeze": -1},
    "motion": {"noise": 1, "shuffle": 1, "freeze": -1},
    "consistency": {"noise": -1, "freeze": 1},
    "random_kernel": {"noise": 1, "blur": 1},
}
METRICS = ["psnr", "ssim", "sharpness", "colour", "flicker", "jerk", "motion", "consistency", "random"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_metric_goes_one_way_as_damage_grows(damage: str) -> None:
    found = ladder(choose(METRICS, {}), clips(8), damage)
    wrong = {
        name: values
        for name, values in found.items()
        if (way := SEEN.get(name, {}).get(damage)) is not None and steps_seen(values) * way < 4
    }
    assert not wrong, wrong
