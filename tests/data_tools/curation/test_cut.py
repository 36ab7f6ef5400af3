"""A span of a film has the span's frames, whatever the container, the order of its frames and their times."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest

from data_tools.curation import cut, look, probe
from data_tools.curation.borders import border_of
from data_tools.curation.shots import mark_of
from data_tools.curation.stage import Drop, Item
from sora_train.core.media import read_mp4
from tests.data.videos import number_of, write_video

FPS = 24.0
STEADY = [n / FPS for n in range(96)]
UNSTEADY = [n / FPS + (0.02 if n % 3 == 1 else 0.0) + (1.0 if n >= 60 else 0.0) for n in range(96)]


def seen(path: Path, work: Path) -> Item:
    """What probe and look say of a film."""
    stat = path.stat()
    item: Item = {"path": str(path), "name": path.name, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    for stage in (probe.stage(16, {}), look.stage(3.0, {})):
        (work / stage.name).mkdir(parents=True, exist_ok=True)
        item |= stage.work(item, stage.parameters, work / stage.name)
    return item


def clip(item: Item, work: Path, start: int, end: int, copy: bool = False) -> tuple[list[int], float]:
    """The numbers in the frames of a span that was cut, and its rate."""
    return (made := span(item, work, start, end, copy))[1], made[2]


def span(item: Item, work: Path, start: int, end: int, copy: bool) -> tuple[Item, list[int], float]:
    """What the stage says of a span, the numbers in its frames, and its rate."""
    arrays = np.load(work / "look" / item["look"])
    about = {"key": "clip", "start": start, "end": end, "border": item.get("border", [0, 0, 0, 0]),
             "marks": [mark_of(arrays["tiny"][n]) for n in (start, end - 1)],
             "stamps": [int(arrays["stamps"][n]) for n in (start, end - 1)]}  # fmt: skip
    (work / "cut").mkdir(exist_ok=True)
    made = cut.cut(item | about, cut.stage(12, 24, None, 2, copy).parameters, work / "cut")
    assert len(np.load(work / "cut" / made["stills"]).files) == 2
    frames, fps = read_mp4(work / "cut" / made["clip"])
    return made, [number_of(frame) for frame in frames], fps


KINDS = pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("a.mp4", "libx264", {"bf": "3", "x264-params": "open-gop=1:keyint=20:b-pyramid=normal"}),
        ("a.mkv", "libx264", {}), ("a.avi", "mpeg4", {}), ("a.webm", "libvpx-vp9", {"cpu-used": "8"}),
        ("a.ts", "libx264", {}),
    ],
)  # fmt: skip


@KINDS
def test_a_span_has_its_frames_and_no_others(name: str, codec: str, options: dict[str, str], tmp_path: Path) -> None:
    write_video(tmp_path / name, STEADY, codec, gop=20, codec_options=options)
    item = seen(tmp_path / name, tmp_path / "work")
    for start, end in ((0, 30), (17, 41), (40, 96), (59, 61)):
        numbers, fps = clip(item, tmp_path / "work", start, end)
        assert numbers == list(range(start, end)) and fps == pytest.approx(FPS, rel=0.01)


@KINDS
def test_a_span_is_copied_without_encoding(name: str, codec: str, options: dict[str, str], tmp_path: Path) -> None:
    write_video(tmp_path / name, STEADY, codec, gop=20, codec_options=options)
    item, work = seen(tmp_path / name, tmp_path / "work"), tmp_path / "work"
    film = read_mp4(tmp_path / name)[0]
    for start, end in ((0, 30), (17, 41), (40, 96), (59, 66)):
        made, numbers, _ = span(item, work, start, end, copy=True)
        assert made["copied"] and numbers == list(range(start, made["end"])) and end - 3 <= made["end"] <= end
        with av.open(str(work / "cut" / made["clip"])) as copied:
            shown = list(copied.decode(video=0))
        assert [frame.time for frame in shown] == pytest.approx([n / FPS for n in range(len(numbers))], abs=0.002)
        for number, frame in zip(numbers, shown, strict=True):
            assert np.array_equal(frame.to_ndarray(format="rgb24"), film[number]), "pixels are the film's own"


def test_a_span_that_packets_cannot_show_is_encoded(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", STEADY, gop=20)
    item = seen(tmp_path / "a.mp4", tmp_path / "work")
    made, numbers, _ = span(item | {"border": [2, 2, 0, 0]}, tmp_path / "work", 17, 41, copy=True)
    assert not made["copied"] and numbers == list(range(17, 41))


def test_frames_of_a_variable_rate_come_at_a_steady_one(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", UNSTEADY, gop=20)
    item = seen(tmp_path / "a.mp4", tmp_path / "work")
    assert item["vfr"] and item["frames"] == 96
    numbers, fps = clip(item, tmp_path / "work", 10, 90)
    seconds = UNSTEADY[89] - UNSTEADY[10]
    assert len(numbers) == pytest.approx(seconds * fps, abs=1) and numbers == sorted(numbers)
    assert set(numbers) <= set(range(10, 90)) and numbers.count(59) > 0.9 * fps  # which stands for a second


def test_a_film_that_changed_behind_the_ledger_is_not_cut(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", STEADY, gop=20)
    item = seen(tmp_path / "a.mp4", tmp_path / "work")
    write_video(tmp_path / "a.mp4", STEADY[:60], gop=20)
    with pytest.raises(Drop, match="changed"):
        clip(item, tmp_path / "work", 40, 80)


def test_borders_are_black_and_alike_and_dark_scenes_have_none() -> None:
    rng = np.random.default_rng(0)
    picture = rng.integers(60, 200, (6, 128, 228)).astype(np.uint8)
    boxed = np.pad(picture[:, 16:-16], ((0, 0), (16, 16), (0, 0)))
    assert border_of(picture, 720, 1280) == (0, 0, 0, 0, False)
    top, bottom, left, right, is_most = border_of(boxed, 720, 1280)
    assert top == bottom and 90 <= top <= 94 and (left, right, is_most) == (0, 0, False)
    narrow = np.pad(picture[:, :, 90:-90], ((0, 0), (0, 0), (90, 90)))
    assert border_of(narrow, 720, 1280).is_most
    night = np.full((6, 128, 228), 6, np.uint8)
    night[:, 20:60, 20:60] = 150
    assert border_of(night, 720, 1280) == (0, 0, 0, 0, False)
