"""Checkpoints: damage is seen, the newest intact one is taken, and pieces fit any number of ranks."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sora_train.core.cli import InputError
from sora_train.training.engine.fragments import Fragment
from sora_train.training.state import checkpoint
from sora_train.training.state.checkpoint import Checkpoints
from sora_train.training.state.checkpoint_format import (
    Pieces,
    latest_intact,
    load_full,
    load_into,
    pieces,
    read_state,
    verify,
    write_pieces,
)
from tests import stubs

pytestmark = pytest.mark.usefixtures("process_group")
SHAPES = {"net/a.weight": (5, 3), "net/a.bias": (7,), "net/b.scale": (1,)}
KINDS = ("master", "exp_avg", "exp_avg_sq", "ema")


def whole(seed: int = 0) -> tuple[list[Fragment], dict[str, Tensor]]:
    """Fragments of three parameters that one rank holds whole, and their averages; every number unlike."""
    generator = torch.Generator().manual_seed(seed)
    fragments, ema = [], {}
    for name, shape in SHAPES.items():
        numel = torch.Size(shape).numel()
        fragments.append(stubs.fragment(name, *(torch.randn(numel, generator=generator) for _ in range(3))))
        ema[name] = torch.randn(numel, generator=generator)
    return fragments, ema


def flat(seed: int = 0) -> dict[str, Tensor]:
    return {key: values for key, (_, values) in pieces(*whole(seed), None).items()}


def state(step: int) -> dict[str, Any]:
    return {"step": step, "position": [1, 2, 3], "shapes": SHAPES}


def saved(folder: Path, *steps: int, keep: int = 10) -> Checkpoints:
    checkpoints = Checkpoints(folder, keep)
    for step in steps:
        checkpoints.save(step, pieces(*whole(step), None), state(step))
        assert checkpoints.wait()
    return checkpoints


def loaded(path: Path) -> dict[str, Tensor]:
    targets = {key: (0, torch.full_like(values, float("nan"))) for key, values in flat().items()}
    load_into(path, targets)
    return {key: values for key, (_, values) in targets.items()}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []


def test_what_was_saved_is_loaded_to_the_bit(tmp_path: Path) -> None:
    newest = saved(tmp_path, 40).newest()
    assert newest == tmp_path / "step-00000040"
    assert verify(newest) is None
    assert read_state(newest) == json.loads(json.dumps(state(40)))
    assert_same(loaded(newest), flat(40))
    ema = load_full(newest, "ema")
    assert {f"net/{name}": tuple(values.shape) for name, values in ema.items()} == SHAPES
    assert torch.equal(ema["a.weight"].flatten(), flat(40)["ema/net/a.weight"])
    assert {p.name for p in newest.iterdir()} == {"rank-0.safetensors", "state.json", "manifest.json"}


def test_it_is_a_copy_that_is_written(tmp_path: Path) -> None:
    fragments, ema = whole(1)
    checkpoints = Checkpoints(tmp_path, 1)
    checkpoints.save(1, pieces(fragments, ema, None), state(1))
    checkpoints.settle()
    for f in fragments:
        f.master.fill_(-1.0)  # the next step
    assert checkpoints.wait()
    assert_same(loaded(tmp_path / "step-00000001"), flat(1))


def test_the_copy_is_made_in_the_background_and_settle_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fragments, ema = whole(1)
    checkpoints, gate, settled = Checkpoints(tmp_path, 1), threading.Event(), threading.Event()
    stage = checkpoints._stage

    def slow(mine: Pieces) -> Pieces:
        assert gate.wait(60)
        return stage(mine)

    monkeypatch.setattr(checkpoints, "_stage", slow)
    checkpoints.save(1, pieces(fragments, ema, None), state(1))  # returns at once
    waiting = threading.Thread(target=lambda: (checkpoints.settle(), settled.set()))
    waiting.start()
    assert not settled.wait(0.1)
    gate.set()
    waiting.join(60)
    assert settled.is_set() and checkpoints.wait()
    assert_same(loaded(tmp_path / "step-00000001"), flat(1))


def test_without_memory_for_the_copy_the_save_fails_and_the_loop_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = saved(tmp_path, 1)

    def full(mine: Pieces) -> Pieces:
        raise MemoryError("no room")

    monkeypatch.setattr(checkpoints, "_stage", full)
    checkpoints.save(2, pieces(*whole(2), None), state(2))
    checkpoints.settle()
    assert not checkpoints.wait() and checkpoints.newest() == tmp_path / "step-00000001"


@pytest.mark.parametrize("name", ["rank-0.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "delete", "empty"])
def test_damage_to_any_file_is_seen_and_an_older_checkpoint_taken(tmp_path: Path, name: str, damage: str) -> None:
    checkpoints = saved(tmp_path, 1, 2)
    file = tmp_path / "step-00000002" / name
    data = file.read_bytes()
    middle = data.index(b'"sha256": "') + 20 if name == "manifest.json" else len(data) // 2
    flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
    file.write_bytes({"flip": flipped, "cut": data[:-5], "delete": b"", "empty": b""}[damage])
    if damage == "delete":
        file.unlink()
    assert verify(file.parent) is not None
    assert checkpoints.newest() == tmp_path / "step-00000001"
    assert latest_intact(tmp_path) == tmp_path / "step-00000001"


@pytest.mark.parametrize("byte", range(0, 1500, 97))
def test_a_flip_of_any_byte_of_the_tensors_is_seen(tmp_path: Path, byte: int) -> None:
    saved(tmp_path, 1)
    file = tmp_path / "step-00000001" / "rank-0.safetensors"
    data = bytearray(file.read_bytes())
    data[byte % len(data)] ^= 0x10
    file.write_bytes(data)
    assert verify(file.parent) == "rank-0.safetensors differs from its checksum"


def test_where_every_checkpoint_is_damaged_it_stops_and_says_so(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1, 2)
    for file in tmp_path.glob("*/state.json"):
        file.unlink()
    with pytest.raises(InputError, match="every checkpoint in .* is damaged"):
        checkpoints.newest()
    with pytest.raises(InputError, match="no intact checkpoint"):
        latest_intact(tmp_path)


def test_a_start_without_room_for_one_checkpoint_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = saved(tmp_path, 1)
    mine = pieces(*whole(2), None)
    needed = sum(values.nbytes for _, values in mine.values()) + (16 << 20)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: SimpleNamespace(free=needed))
    checkpoints.require_room(mine)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: SimpleNamespace(free=needed - 1))
    with pytest.raises(InputError, match=r"no room for a checkpoint: 0.02 GiB free in .*; make room") as error:
        checkpoints.require_room(mine)
    assert "\n" not in str(error.value)


def test_a_new_run_has_none(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "checkpoints", 3).newest() is None


def test_the_newest_are_kept_and_older_ones_go(tmp_path: Path) -> None:
    saved(tmp_path, 5, 10, 15, 20, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000015", "step-00000020"]


def test_the_best_is_kept_until_another_is_better(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 5, keep=1)
    checkpoints.keep_best(5)
    for step in (10, 15):
        checkpoints.save(step, pieces(*whole(step), None), state(step))
    assert checkpoints.wait()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000005", "step-00000015"]
    checkpoints.keep_best(15)
    checkpoints.save(20, pieces(*whole(20), None), state(20))
    assert checkpoints.wait()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000015", "step-00000020"]


def test_a_damaged_newer_checkpoint_does_not_push_out_the_one_just_saved(tmp_path: Path) -> None:
    """A run that fell back to step 1 saves step 2: it must not be deleted for the sake of the broken step 4."""
    saved(tmp_path, 1, 4)
    (tmp_path / "step-00000004" / "state.json").unlink()
    checkpoints = saved(tmp_path, 2, keep=1)
    assert checkpoints.newest() == tmp_path / "step-00000002"


def test_a_step_saved_again_replaces_the_damaged_one(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 3)
    (tmp_path / "step-00000003" / "state.json").write_text("{}")
    checkpoints.save(3, pieces(*whole(3), None), state(3))
    assert checkpoints.wait() and checkpoints.newest() == tmp_path / "step-00000003"


def test_every_file_is_on_the_disk_before_the_checkpoint_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What no kill shows, as the page cache outlives a process: the order of syncs and rename, for a power cut."""
    order: list[tuple[str, str]] = []
    fsync, rename = os.fsync, Path.rename

    def syncing(descriptor: int) -> None:
        order.append(("sync", str(Path(f"/proc/self/fd/{descriptor}").readlink())))
        fsync(descriptor)

    def renaming(path: Path, target: Path) -> Path:
        order.append(("rename", str(target)))
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(Path, "rename", renaming)
    saved(tmp_path, 1)
    temporary = tmp_path / ".tmp-step-00000001"
    names = ("rank-0.safetensors", "state.json", "manifest.json")
    assert order == [
        *(("sync", str(temporary / name)) for name in names), ("sync", str(temporary)),
        ("rename", str(tmp_path / "step-00000001")), ("sync", str(tmp_path)),
    ]  # fmt: skip


@pytest.mark.parametrize("what", ["dangling link", "link to itself", "file", "empty folder", "link to another"])
def test_what_stands_in_a_checkpoints_place_is_not_taken_for_one_and_gives_way(tmp_path: Path, what: str) -> None:
    checkpoints = saved(tmp_path, 1)
    place = tmp_path / "step-00000002"
    other = tmp_path / "step-00000001"
    target = {"dangling link": tmp_path / "gone", "link to itself": place, "link to another": other}
    if what in target:
        place.symlink_to(target[what])
    elif what == "file":
        place.write_bytes(b"")
    else:
        place.mkdir()
    assert checkpoints.newest() == tmp_path / "step-00000001"
    checkpoints.save(2, pieces(*whole(2), None), state(2))
    assert checkpoints.wait() and checkpoints.newest() == place and not place.is_symlink()
    assert verify(tmp_path / "step-00000001") is None


def test_what_a_killed_save_left_is_no_checkpoint_and_is_removed(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    shutil.copytree(tmp_path / "step-00000001", tmp_path / ".tmp-step-00000002")
    checkpoints = Checkpoints(tmp_path, 3)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert checkpoints.newest() == tmp_path / "step-00000001"


def test_a_save_that_fails_is_told_and_leaves_the_older_ones(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1)
    (tmp_path / ".tmp-step-00000002").write_text("in the way")
    checkpoints.save(2, pieces(*whole(2), None), state(2))
    assert not checkpoints.wait()
    assert checkpoints.wait(), "told once"
    assert checkpoints.newest() == tmp_path / "step-00000001"
    checkpoints.save(3, pieces(*whole(3), None), state(3))
    assert checkpoints.wait() and checkpoints.newest() == tmp_path / "step-00000003"


def test_a_rank_that_goes_away_inside_a_save_makes_it_a_failed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Or a run whose last save it was would end as if it had been written."""
    checkpoints = saved(tmp_path, 1)

    def gone(*_: Any, **__: Any) -> None:
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(checkpoint.dist, "all_gather_object", gone)
    checkpoints.save(2, pieces(*whole(2), None), state(2))
    assert not checkpoints.wait() and checkpoints.failed == 1
    assert "checkpoint of step 2 not written: rank 0: Connection closed by peer" in caplog.text
    assert checkpoints.newest() == tmp_path / "step-00000001"


def written_by(tmp_path: Path, ranks: list[Pieces]) -> Path:
    """A checkpoint as that many ranks together write it."""
    temporary = tmp_path / ".tmp-step-00000009"
    temporary.mkdir(parents=True)
    records = [write_pieces(temporary / f"rank-{n}.safetensors", mine) for n, mine in enumerate(ranks)]
    publisher = Checkpoints.__new__(Checkpoints)  # publishing needs its folder and retention, no process group
    publisher.folder, publisher.keep, publisher.keep_every, publisher.mirror = tmp_path, 3, 0, None
    publisher.best = None
    publisher._publish(temporary, 9, records, state(9))
    return tmp_path / "step-00000009"


@pytest.mark.parametrize("ranks", [1, 2, 3, 16])
def test_tensors_shared_out_over_writers_load_whole(tmp_path: Path, ranks: int) -> None:
    """Without ZeRO every rank holds everything and writes its share; sixteen ranks are more than some have elements."""
    parts = [pieces(*whole(9), (rank, ranks)) for rank in range(ranks)]
    assert sum(values.numel() for part in parts for _, values in part.values()) == 4 * (15 + 7 + 1)
    path = written_by(tmp_path, parts)
    assert verify(path) is None
    assert_same(loaded(path), flat(9))


@pytest.mark.parametrize("bounds", [[(0, 9), (9, 23)], [(0, 4), (4, 17), (17, 23)]])
def test_partitions_that_cut_through_parameters_load_whole_and_into_other_partitions(
    tmp_path: Path, bounds: list[tuple[int, int]]
) -> None:
    """Under ZeRO the flat list of all elements is cut anywhere."""
    path = written_by(tmp_path, [partition(9, low, high) for low, high in bounds])
    assert verify(path) is None
    assert_same(loaded(path), flat(9))
    for low, high in ((0, 6), (6, 12), (12, 18), (18, 23)):  # four ranks load what two or three wrote
        wanted = partition(9, low, high)
        targets = {key: (start, torch.zeros_like(values)) for key, (start, values) in wanted.items()}
        load_into(path, targets)
        assert_same({k: v for k, (_, v) in targets.items()}, {k: v for k, (_, v) in wanted.items()})


def partition(seed: int, low: int, high: int) -> Pieces:
    """Elements low .. high of all parameters laid end to end, as one rank's pieces."""
    fragments, ema = whole(seed)
    mine, averages, at = [], {}, 0
    for f in fragments:
        start, stop = max(low - at, 0), min(high - at, f.master.numel())
        if start < stop:
            mine.append(stubs.fragment(f.name, *(x[start:stop] for x in (f.master, *f.states.values())), start=start))
            averages[f.name] = ema[f.name][start:stop]
        at += f.master.numel()
    return pieces(mine, averages, None)


def test_each_of_several_ranks_sees_damage_in_its_own_share(tmp_path: Path) -> None:
    path = written_by(tmp_path, [pieces(*whole(9), (rank, 3)) for rank in range(3)])
    file = path / "rank-1.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    seen = [verify(path, rank, 2) for rank in range(2)]
    assert sum(damage is not None for damage in seen) == 1


@pytest.mark.parametrize("key", ["master/net/other.weight", "master/net/a.bias"])
def test_another_models_checkpoint_is_refused_by_parameter(tmp_path: Path, key: str) -> None:
    saved(tmp_path, 1)
    with pytest.raises(InputError, match=f"of 9 values of {key}; was it another model's"):
        load_into(tmp_path / "step-00000001", {key: (0, torch.zeros(9))})


def test_every_kind_is_saved() -> None:
    assert set(flat()) == {f"{kind}/{name}" for kind in KINDS for name in SHAPES}
