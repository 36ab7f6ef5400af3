"""The demo world keeps its promises, and its shards are real WebDataset shards of real videos."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds
from PIL import Image

from data_tools import make_demo
from sora_train.core.cli import InputError
from sora_train.core.media import read_mp4
from sora_train.demo_world import scenes as world
from sora_train.demo_world.detect import sight
from sora_train.demo_world.render import render
from sora_train.demo_world.scenes import COLOURS, DIRECTIONS, SHAPES

OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}


def scenes(kind: str | None, split: str, count: int, seed: int = 0) -> list[world.Scene]:
    rng = np.random.default_rng(seed)
    return [world.make_scene(rng, split, kind) for _ in range(count)]


def movements(scene: world.Scene) -> set[world.Combination]:
    """Every (colour, shape, direction) that can be seen in a scene."""
    shown = {(t.colour, t.shape, t.direction) for t in scene.things if t.direction != world.STILL}
    back = {(c, s, OPPOSITE[d]) for c, s, d in shown} if scene.kind == "return" else set()
    return shown | back


def make(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["make_demo", *arguments])
    return make_demo.main()


def test_splits_share_no_movement() -> None:
    shown = {split: set().union(*map(movements, scenes(None, split, 3000))) for split in world.SPLITS}
    assert shown == {split: set(world.combinations(split)) for split in world.SPLITS}
    assert sum(map(len, shown.values())) == len(set().union(*shown.values()))
    assert sum(map(len, shown.values())) == len(COLOURS) * len(SHAPES) * len(DIRECTIONS)
    for combinations in shown.values():
        assert {c for c, _, _ in combinations} == set(COLOURS)
        assert {s for _, s, _ in combinations} == set(SHAPES)
        assert {d for _, _, d in combinations} == set(DIRECTIONS)


def test_kinds_and_rates_have_the_shares_they_should() -> None:
    for split, shares in (("train", world.KINDS), ("val", world.HELD_OUT_KINDS), ("test", world.HELD_OUT_KINDS)):
        drawn = scenes(None, split, 3000)
        assert {s.kind for s in drawn} == set(shares)
        for kind, share in shares.items():
            assert sum(s.kind == kind for s in drawn) / len(drawn) == pytest.approx(share, abs=0.03)
    videos = [s for s in drawn if s.kind != "image"]
    assert {s.frames for s in videos} == {9, 17, 33}
    assert 0.1 < sum(s.fps == 16 for s in videos) / len(videos) < 0.35
    assert {(s.height, s.width) for s in drawn} == set(world.FRAME_SIZES)


@pytest.mark.parametrize("split", world.SPLITS)
def test_one_object_stays_whole_and_goes_its_way_at_its_speed(split: str) -> None:
    for scene in scenes("one", split, 40):
        frames = render(scene)
        (thing,) = scene.things
        seen = [sight(frame) for frame in (frames[0], frames[-1])]
        assert [(len(s), s[0].colour, s[0].shape, s[0].whole) for s in seen] == [
            (1, thing.colour, thing.shape, True)
        ] * 2
        moved = np.array([seen[1][0].y - seen[0][0].y, seen[1][0].x - seen[0][0].x])
        pace = moved @ np.array(DIRECTIONS[thing.direction]) / min(scene.height, scene.width) / scene.seconds
        assert pace == pytest.approx(world.SPEEDS[thing.speed], rel=0.1)


def test_two_objects_never_overlap() -> None:
    for scene in scenes("two", "train", 40):
        alone = [render(replace_things(scene, (thing,))) for thing in scene.things]
        ground = render(replace_things(scene, ()))
        touched = [(a != ground).any(-1) for a in alone]
        assert not (touched[0] & touched[1]).any()
        assert all(len(sight(frame)) == 2 for frame in render(scene)[:: scene.frames - 1])


def test_mover_passes_below_the_cover() -> None:
    for scene in scenes("behind", "train", 10):
        mover, cover = scene.things
        frames = render(scene)
        for frame in (frames[0], frames[-1]):
            assert {(s.colour, s.shape) for s in sight(frame)} == {(t.colour, t.shape) for t in scene.things}
        middle = sight(frames[scene.frames // 2])
        assert [(s.colour, s.shape) for s in middle] == [(cover.colour, "square")]
        for frame in frames[:: scene.frames // 4]:
            (seen,) = (s for s in sight(frame) if s.colour == cover.colour)
            assert abs(seen.pixels - middle[0].pixels) <= 0.1 * middle[0].pixels  # never hidden by the mover
        assert mover.colour != cover.colour


def test_object_leaves_fully_and_comes_back_where_it_was() -> None:
    for scene in scenes("return", "val", 20):
        frames = render(scene)
        ground = render(replace_things(scene, ()))
        assert (frames[scene.frames // 2] == ground[0]).all()
        assert (frames[0] == frames[-1]).all()
        assert len(sight(frames[0])) == 1 and sight(frames[0])[0].whole


def replace_things(scene: world.Scene, things: tuple[world.Thing, ...]) -> world.Scene:
    return world.Scene(scene.kind, scene.background, scene.height, scene.width, scene.frames, scene.fps, things)


def test_captions_name_what_is_shown() -> None:
    rng = np.random.default_rng(0)
    for scene in scenes(None, "train", 200):
        texts = world.captions(scene, rng)
        assert len(set(texts.values())) == len(texts) == 4
        for text in texts.values():
            assert all(f"{t.colour} {t.shape}" in text for t in scene.things)
            assert "  " not in text and text == text.strip()


def test_shards_read_with_plain_webdataset_and_agree_with_their_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("clips=22", "held_out=6", "shard_clips=12")
    assert make(monkeypatch, f"out={tmp_path / 'a'}", *arguments, "workers=2") == 0
    shards = sorted(p.name for p in (tmp_path / "a").glob("*.tar"))
    assert shards == ["test-000000.tar", "train-000000.tar", "train-000001.tar", "val-000000.tar"]
    assert len(list((tmp_path / "a").glob("*.index.parquet"))) == 4
    samples = [s for name in shards for s in wds.WebDataset(str(tmp_path / "a" / name), shardshuffle=False)]
    assert len({s["__key__"] for s in samples}) == 34
    for sample in samples:
        check_sample(sample)

    capsys.readouterr()
    assert make(monkeypatch, f"out={tmp_path / 'a'}", *arguments) == 0
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(InputError, match="other options"):
        make(monkeypatch, f"out={tmp_path / 'a'}", "clips=23", "held_out=6", "shard_clips=12")

    # An interrupted run: a finished shard is kept, the rest is made again; the end is the same, byte for byte.
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "demo-unfinished.json").write_bytes((tmp_path / "a" / "demo.json").read_bytes())
    (tmp_path / "b" / shards[1]).write_bytes((tmp_path / "a" / shards[1]).read_bytes())
    (tmp_path / "b" / "train-000001.tar.tmp").write_bytes(b"half a shard")
    assert make(monkeypatch, f"out={tmp_path / 'b'}", *arguments, "workers=1") == 0
    for path in (tmp_path / "a").iterdir():
        if path.suffix in (".tar", ".json"):
            assert (tmp_path / "b" / path.name).read_bytes() == path.read_bytes()
    assert {p.name for p in (tmp_path / "b").iterdir()} == {p.name for p in (tmp_path / "a").iterdir()}


def check_sample(sample: dict[str, Any]) -> None:
    fields = json.loads(sample["json"])
    if "mp4" in sample:
        frames, fps = read_mp4(sample["mp4"])
        assert fps == fields["fps"]
    else:
        frames = np.asarray(Image.open(io.BytesIO(sample.get("png") or sample["jpg"])))[None]
        assert fields["scene"]["kind"] in ("image", "pair")
    assert frames.shape == (fields["frames"], fields["height"], fields["width"], 3)
    split = sample["__key__"].partition("_")[0]
    for thing in fields["scene"]["things"]:
        assert set(thing) == {"colour", "shape", "size", "direction", "speed"}
        if thing["direction"] != world.STILL:
            combination = (thing["colour"], thing["shape"], thing["direction"])
            assert combination in world.combinations(split)
    assert {s.colour for s in sight(frames[0])} == {t["colour"] for t in fields["scene"]["things"]}


def test_foreign_folders_and_bad_numbers_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train-000000.tar").write_bytes(b"mine")
    (tmp_path / "file").write_bytes(b"")
    for arguments, message in (
        ([f"out={tmp_path}"], "no demo data"),
        ([f"out={tmp_path / 'file'}"], "cannot use"),
        ([f"out={tmp_path / 'new'}", "clips=0"], "at least 1"),
        ([], "missing: out="),
    ):
        with pytest.raises(InputError, match=message):
            make(monkeypatch, *arguments)
    assert (tmp_path / "train-000000.tar").read_bytes() == b"mine"
