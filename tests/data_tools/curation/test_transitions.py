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


@pytest.mark.campaign
@pytest.mark.timeout(1800)
def test_shares_over_many_transitions(tmp_path: Path) -> None:
    """60 cuts, 29 of short shots, 24 dissolves, 8 fades through black, 12 flashes and 8 whip pans, made from seeds."""
    hard = films.joined([films.shot(1000 + n, 14 + n % 9, 0.3 + n % 4) for n in range(61)])
    short = films.joined([films.shot(1100 + n, 6 + n % 5) for n in range(30)])
    told = found_of(hard.cuts, seen(tmp_path, hard.frames_THWC, "hard")[0])
    brief = found_of(short.cuts, seen(tmp_path, short.frames_THWC, "short")[0])
    slow = [_is_told(tmp_path, n, dissolve=True) for n in range(24)]
    fades = [_is_told(tmp_path, n, dissolve=False) for n in range(8)]
    false = []
    for n in range(12):
        flashes = films.flashed(films.shot(1400 + n, 40, 0.5 + n % 3), 12 + n, 1 + n % 4)
        false += seen(tmp_path, flashes, f"flash-{n}")[0]
    of_pans = [cut for n in range(8) for cut in seen(tmp_path, _pan(1500 + n, 16.0 + n), f"pan-{n}")[0]]
    print(f"cuts {told}, short {brief}, dissolves {sum(slow)}, fades {sum(fades)}, flashes {false}, pans {of_pans}")
    assert told[0] >= 0.98 * 60 and told[1] == 0
    assert brief[0] >= 0.95 * 29 and brief[1] == 0
    assert sum(slow) >= 0.75 * 24 and sum(fades) >= 0.75 * 8
    assert false == [] and of_pans == []


def _is_told(folder: Path, n: int, dissolve: bool) -> bool:
    """Whether a dissolve, or a fade out and in, of 8 to 30 frames is cut at or marked."""
    frames = 8 + n % 12 * 2
    one, other = films.shot(1200 + n, 50, 0.4), films.shot(1300 + n, 50, 0.4)
    black = np.zeros((frames + 2, *one.shape[1:]), np.uint8)
    film = films.dissolved(one, other, frames) if dissolve else films.dissolved(one, black, frames // 2)
    film = film if dissolve else films.dissolved(film, other, frames // 2)
    first, end = 50 - frames, len(film) - 50 + frames // 2
    cuts, slow = seen(folder, film, f"{'dissolve' if dissolve else 'fade'}-{n}")
    return any(first <= cut <= end for cut in cuts) or any(a < end and b > first for a, b in slow)


def _pan(seed: int, fastest: float) -> np.ndarray:
    """A shot whose camera whips over to another part of its world."""
    ramp = np.concatenate([np.linspace(1, fastest, 6), np.full(3, fastest), np.linspace(fastest, 1, 6)])
    moved = [films.shot(seed, 1, start=10 + float(along)) for along in np.cumsum(ramp)]
    after = films.shot(seed, 20, 0.5, start=10 + float(ramp.sum()))
    return np.concatenate([films.shot(seed, 20, 0.5), *moved, after])


def seen_tiny(frames_THWC: np.ndarray) -> np.ndarray:
    import cv2

    gray = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames_THWC]
    return np.stack([cv2.resize(one, (32, 18), interpolation=cv2.INTER_AREA) for one in gray])
