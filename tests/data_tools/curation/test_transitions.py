"""Cuts are found where they are; flashes and pans are none; dissolves and fades are marked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_tools.curation import look, probe, shots
from data_tools.curation.transitions import slow_changes, true_cuts
from tests.data_tools.curation import films

CUT = 3.0


def seen(folder: Path, frames_THWC: np.ndarray, name: str = "film") -> tuple[list[int], list[list[int]]]:
    """Cuts and slow changes of a film, through the files and stages of the command."""
    path = films.write(folder / f"{name}.mp4", frames_THWC)
    stat = path.stat()
    item = {"path": str(path), "name": path.name, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    place = folder / "work"
    for stage in (probe.stage(16, {}), look.stage(CUT, {}), shots.stage(0.5, 60, 0.25, 16)):
        (place / stage.name).mkdir(parents=True, exist_ok=True)
        item |= stage.work(item, stage.parameters, place / stage.name)
    arrays = np.load(place / "look" / item["look"])
    cuts = true_cuts(arrays["cuts"].tolist(), arrays["tiny"], item["fps"])
    return cuts, item["slow"]


def found_of(true: list[int], found: list[int], within: int = 2) -> tuple[int, int]:
    """True places that were found, and found ones that are none."""
    hit = sum(any(abs(place - one) <= within for one in found) for place in true)
    return hit, sum(not any(abs(place - one) <= within for place in true) for one in found)


def test_hard_cuts_are_found_at_their_very_frame(tmp_path: Path) -> None:
    film = films.joined([films.shot(seed, 14 + seed % 5) for seed in range(8)])
    cuts, slow = seen(tmp_path, film.frames_THWC)
    assert cuts == film.cuts and not slow


def test_shots_of_eight_frames_are_told_apart(tmp_path: Path) -> None:
    film = films.joined([films.shot(20 + seed, 8) for seed in range(10)])
    assert found_of(film.cuts, seen(tmp_path, film.frames_THWC)[0], within=0) == (9, 0)


def test_flashes_and_whip_pans_are_no_cuts(tmp_path: Path) -> None:
    calm = films.shot(3, 60)
    flashes = films.flashed(films.flashed(calm, 15, 2), 40, 4)
    assert seen(tmp_path, flashes, "flashes") == ([], [])
    start = films.shot(4, 20, 0.5)
    ramp = np.concatenate([np.linspace(1, 24, 6), np.full(3, 24), np.linspace(24, 1, 6)])
    pan = [films.shot(4, 1, start=10 + float(along)) for along in np.cumsum(ramp)]
    after = films.shot(4, 20, 0.5, start=10 + float(ramp.sum()))
    assert seen(tmp_path, np.concatenate([start, *pan, after]), "pan") == ([], [])


@pytest.mark.parametrize("frames", [12, 24])
def test_a_dissolve_is_cut_or_marked(frames: int, tmp_path: Path) -> None:
    one, other = films.shot(5, 60, 0.5), films.shot(6, 60, 0.5)
    cuts, slow = seen(tmp_path, films.dissolved(one, other, frames))
    middle = 60 - frames / 2
    assert any(abs(cut - middle) <= frames / 2 for cut in cuts) or any(a <= middle <= b for a, b in slow)


def test_a_fade_from_black_is_marked_and_slow_movement_is_not(tmp_path: Path) -> None:
    fade = films.dissolved(np.zeros((40, films.HEIGHT, films.WIDTH, 3), np.uint8), films.shot(7, 60, 0.5), 30)
    cuts, slow = seen(tmp_path, fade, "fade")
    assert not cuts and len(slow) == 1 and slow[0][0] <= 20 and slow[0][1] >= 32
    for speed in (0.3, 1.0, 3.0):
        assert slow_changes(seen_tiny(films.shot(8, 90, speed)), [], films.FPS) == []


def seen_tiny(frames_THWC: np.ndarray) -> np.ndarray:
    import cv2

    gray = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames_THWC]
    return np.stack([cv2.resize(one, look.TINY[::-1], interpolation=cv2.INTER_AREA) for one in gray])
