"""A damaged tar loses what is damaged and nothing else, and what is lost is said."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
import webdataset as wds

from sora_train.data.index.tar import Fault, Member, walk

NAMES = [f"{n}.{e}" for n in range(4) for e in ("mp4", "txt")]


def write(path: Path, form: int = tarfile.USTAR_FORMAT, names: list[str] = NAMES) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            data = name.encode() * 100
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def members(path: Path) -> list[Member]:
    with path.open("rb") as file:
        return [found for found in walk(file) if isinstance(found, Member)]


def faults(path: Path) -> list[Fault]:
    with path.open("rb") as file:
        return [found for found in walk(file) if isinstance(found, Fault)]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_whole_tar_gives_what_tarfile_gives(tmp_path: Path, form: int) -> None:
    names = [*NAMES, "folder/" + "long" * 40 + ".txt", "ü/猫.txt"]
    split = [*NAMES, "a" * 90 + "/" + "b" * 90]  # all that this form can name
    path = write(tmp_path / "a.tar", form, split if form == tarfile.USTAR_FORMAT else names)
    with tarfile.open(path) as tar:
        expected = [(m.name, m.offset_data, m.size) for m in tar if m.isfile()]
    assert [(m.name, m.offset, m.size) for m in members(path)] == expected
    assert faults(path) == []


def test_a_tar_of_webdataset_gives_what_tarfile_gives(corpus: list[str]) -> None:
    path = Path(corpus[0])
    with tarfile.open(path) as tar:
        expected = [(m.name, m.offset_data, m.size) for m in tar if m.isfile()]
    assert [(m.name, m.offset, m.size) for m in members(path)] == expected and faults(path) == []


def test_a_cut_between_two_members_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar")
    at = members(path)[4].header
    path.write_bytes(path.read_bytes()[:at])
    assert [m.name for m in members(path)] == NAMES[:4]
    assert [(f.cause, f.offset) for f in faults(path)] == [("no_end_mark", at)]
    taken = list(wds.WebDataset(str(path), shardshuffle=False, empty_check=False))
    assert len(taken) == 2, "webdataset takes it for a whole one"


@pytest.mark.parametrize("keep", [1, 300, 512, 700, 900])
def test_a_cut_inside_a_member_is_noticed(tmp_path: Path, keep: int) -> None:
    path = write(tmp_path / "a.tar")
    at = members(path)[4].header
    path.write_bytes(path.read_bytes()[: at + keep])
    assert [m.name for m in members(path)] == NAMES[:4]
    assert [f.cause for f in faults(path)] == ["truncated" if keep >= 512 else "no_end_mark"]


@pytest.mark.parametrize("where", [3, 130, 150, 156, 260])
def test_a_flipped_bit_in_a_header_loses_that_member_and_no_other(tmp_path: Path, where: int) -> None:
    path = write(tmp_path / "a.tar")
    data = bytearray(path.read_bytes())
    bad = members(path)[3]
    data[bad.header + where] ^= 4
    path.write_bytes(data)
    assert [m.name for m in members(path)] == [n for n in NAMES if n != bad.name]
    assert [(f.cause, f.lost) for f in faults(path)] == [("bad_header", 512 + -(-bad.size // 512) * 512)]


def test_zeros_over_a_header_lose_that_member_and_no_other(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar")
    data = bytearray(path.read_bytes())
    bad = members(path)[2]
    data[bad.header : bad.header + 512] = bytes(512)
    path.write_bytes(data)
    assert [m.name for m in members(path)] == [n for n in NAMES if n != bad.name]
    assert [f.cause for f in faults(path)] == ["zeros", "bad_header"]


@pytest.mark.parametrize(
    ("data", "cause"),
    [(b"", "empty"), (b"<html>503</html>" * 99, "not_a_tar"), (b"\x1f\x8b" + bytes(999), "not_a_tar")],
)
def test_what_is_no_tar_is_one_fault(tmp_path: Path, data: bytes, cause: str) -> None:
    (tmp_path / "a.tar").write_bytes(data)
    assert members(tmp_path / "a.tar") == []
    assert [f.cause for f in faults(tmp_path / "a.tar")] == [cause]


def test_sizes_that_lie_end_the_walk_with_a_fault(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar")
    data = bytearray(path.read_bytes())
    at = members(path)[2].header
    data[at + 124 : at + 136] = b"\x80" + b"\xff" * 11  # base 256, far beyond the file
    data[at + 148 : at + 156] = f"{sum(data[at : at + 148]) + 256 + sum(data[at + 156 : at + 512]):06o}\0 ".encode()
    path.write_bytes(data)
    assert [m.name for m in members(path)] == NAMES[:2]
    assert [f.cause for f in faults(path)] == ["truncated"]
