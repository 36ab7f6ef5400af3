"""Lint finds each fault by its name, reads without writing, and says by its exit code whether samples are lost."""

from __future__ import annotations

import json
import random
import shutil
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_tools import lint as linting
from data_tools.lint import MEANING, WARNINGS, lint
from sora_train.core.cli import InputError
from sora_train.data.index.make import index_shards
from sora_train.data.index.places import index_path
from sora_train.data.read.store import Store
from tests.faults.bad_files import damaged_tar

Write = Callable[[Path, list[dict[str, Any]]], str]
Make = Callable[[int], dict[str, Any]]


def causes(*shards: str) -> dict[str, int]:
    found = lint(list(shards), Store())
    totals: dict[str, int] = {}
    for (_, cause), count in found.counts.items():
        totals[cause] = totals.get(cause, 0) + count
    return totals


def test_clean_shards_have_no_findings_and_nothing_is_written(corpus: list[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in Path(corpus[0]).parent.iterdir()}
    found = lint(corpus, Store())
    assert (found.samples, found.usable, found.errors, dict(found.counts)) == (24, 24, 0, {})
    assert {path: path.stat().st_mtime_ns for path in Path(corpus[0]).parent.iterdir()} == before


def test_names_order_and_copies(tmp_path: Path, write_samples: Write, make_sample: Make) -> None:
    good = {"png": make_sample(0)["png"], "txt": b"a"}
    two = {"__key__": "two", **good, "pkl": b"x"}
    shard = Path(write_samples(tmp_path / "a.tar", [{"__key__": "one", **good}, two]))
    with tarfile.open(shard, "a") as tar:
        for name in ("three.png", "four.txt", "three.txt", "/etc/five.png", "six.v1.2.png"):
            tar.addfile(tarfile.TarInfo(name))
        link = tarfile.TarInfo("link.mp4")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    other = write_samples(tmp_path / "b.tar", [{"__key__": "one", **good}])
    assert causes(str(shard), other) == {
        "no_index": 2, "same_media": 2, "key_twice": 1, "executable": 1, "interleaved": 1, "hostile_name": 1,
        "dots_in_name": 1, "link": 1, "empty": 2, "no_media": 2,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "cause"),
    [
        ("tar_cut_between", "tar_no_end_mark"), ("tar_cut_inside", "tar_truncated"), ("tar_html", "tar_not_a_tar"),
        ("tar_zero_header", "tar_zeros"), ("tar_random_block", "tar_bad_header"), ("tar_empty", "tar_empty"),
    ],
)  # fmt: skip
def test_damaged_tars(own_corpus: list[str], kind: str, cause: str) -> None:
    shard = Path(own_corpus[0])
    shard.write_bytes(damaged_tar(kind, shard.read_bytes(), random.Random(1)))
    assert cause in causes(str(shard))


def test_what_differs_from_its_index(own_corpus: list[str]) -> None:
    from sora_train.data.index.index import load_index

    index = load_index(own_corpus)
    data = bytearray(Path(own_corpus[0]).read_bytes())
    data[int(index.offset[0]) + int(index.size[0]) - 20] ^= 1
    data[int(index.caption_offset[4]) + 1] ^= 1
    Path(own_corpus[0]).write_bytes(data)
    shutil.copy(index_path(own_corpus[0]), index_path(own_corpus[1]))
    index_path(own_corpus[2]).unlink()
    found = causes(*own_corpus)
    assert found.pop("checksum") == 2 and found.pop("undecodable", 1) == 1
    assert found == {"stale_index": 1, "no_index": 1}


def test_exit_codes_and_forms(
    own_corpus: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def code(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["lint", *arguments])
        return linting.main()

    assert code(own_corpus[0]) == 0 and "8 of 8 samples usable; 0 errors" in capsys.readouterr().out
    index_path(own_corpus[0]).unlink()
    assert code(own_corpus[0], "format=json") == 0, "a warning alone"
    assert json.loads(capsys.readouterr().out)["faults"][0]["cause"] == "no_index"
    Path(own_corpus[0]).write_bytes(Path(own_corpus[0]).read_bytes()[:-2048])
    assert code(own_corpus[0], "format=json", "examples=1") == 1
    assert json.loads(capsys.readouterr().out)["errors"] == 1
    for wrong in ([], ["none-*.tar"], [own_corpus[0], "format=xml"]):
        with pytest.raises(InputError):
            code(*wrong)


def test_every_warning_is_explained() -> None:
    assert set(MEANING) >= WARNINGS


def test_an_index_can_be_made_of_what_lint_calls_clean(own_corpus: list[str]) -> None:
    index_path(own_corpus[0]).unlink()
    assert set(causes(own_corpus[0])) == {"no_index"}
    index_shards(own_corpus, 1)
    assert causes(own_corpus[0]) == {}
