"""The page shows what is in the shards, names what is dropped, and needs nothing from outside."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_tools import inspect as inspecting
from data_tools.inspect import View, seen
from sora_train.core.cli import InputError
from sora_train.data.index.index import load_index

Write = Callable[[Path, list[dict[str, Any]]], str]
Make = Callable[[int], dict[str, Any]]


def page(monkeypatch: pytest.MonkeyPatch, out: Path, *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["inspect", *arguments, f"out={out}"])
    assert inspecting.main() == 0
    return out.read_text()


def test_a_page_stands_alone_and_shows_every_sample(
    corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = page(monkeypatch, tmp_path / "page.html", *corpus, "max_pixels=1024", "multiple=8")
    assert "3 shards, 24 usable samples" in text and "18 videos" in text and "6 images" in text
    assert text.count("<img") == 24 and "block number 2" in text and "a block of light, number 1" in text
    assert not re.search(r"(src|href)=['\"]?(?!data:)\w", text) and "http" not in text.replace("</html>", "")


def test_what_is_refused_is_named_and_captions_are_only_text(
    tmp_path: Path, write_samples: Write, make_sample: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    evil = make_sample(0) | {"txt": b"<script>alert(1)</script>"}
    shard = write_samples(tmp_path / "s.tar", [evil, {"__key__": "bad", "mp4": b"no", "txt": b"x"}])
    text = page(monkeypatch, tmp_path / "page.html", shard, "samples=5")
    assert "not_a_video" in text and "1 of 2" in text
    assert "<script>" not in text and "&lt;script&gt;alert(1)" in text


def test_tokens_and_cuts_are_those_of_the_figures_given(corpus: list[str]) -> None:
    made = seen(load_index(corpus), View(fps=8.0, max_frames=9, max_pixels=4096, multiple=16, temporal_stride=4))
    assert made["frames"][:4].tolist() == [1, 9, 9, 9]
    assert made["tokens"][:4].tolist() == [16, 48, 48, 48]
    assert made["share"][:4].tolist() == [1.0, 1.0, 9 / 17, 9 / 17]


CONFIGURED = ("experiment=demo", "data.max_pixels=1024", "data.max_tokens=96", "data.slots=3", "samples=4")


def test_a_configuration_shows_what_it_leaves_out_and_how_it_packs(
    corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_samples: Write, make_sample: Make
) -> None:
    monkeypatch.chdir(tmp_path)
    other = write_samples(tmp_path / "other.tar", [make_sample(1), {"__key__": "bad", "mp4": b"no", "txt": b"x"}])
    sources = (
        f"data.sources.demo.shards=[{','.join(corpus[:2])}]", "+data.sources.demo.filter='frames > 1'",
        f"+data.sources.more.shards=[{other}]",
    )  # fmt: skip
    text = page(monkeypatch, tmp_path / "page.html", *CONFIGURED, *sources)
    assert "demo</td><td>2</td><td>16</td><td>0</td><td>4 (00000, 00004, 00008, 00012)</td><td>frames &gt; 1" in text
    assert "more</td><td>1</td><td>2</td><td>1 (not_a_video 1)</td><td>0</td><td>none" in text
    assert "3 shards, 17 usable samples" in text
    assert "steps of an epoch" in text and "balance of the slots" in text and "How it packs</h2>" in text
    drawn = re.findall(r"<title>(\w+): (\d+)x(\d+)x(\d+), (\d+) tokens</title>", text)
    assert drawn and all(int(tokens) <= 96 for *_, tokens in drawn)
    assert not {key for key, *_ in drawn} & {"00000", "00004", "00008", "00012", "bad"}
    assert not (tmp_path / "runs").exists(), "nothing is written but the page"


def test_shards_that_are_named_stand_for_the_configurations_own_and_each_stage_has_its_packing(
    corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = "data.stages=[{until_step:5,max_pixels:256},{max_frames:5}]"
    text = page(monkeypatch, tmp_path / "page.html", corpus[0], *CONFIGURED, stages)
    assert "How it packs in stage 1 of 2, until step 5" in text and "How it packs in stage 2 of 2" in text
    assert "shards</td><td>1</td><td>8</td>" in text and "max_pixels 256" in text


def test_samples_without_captions_are_of_use_to_an_autoencoder(
    tmp_path: Path, write_samples: Write, make_sample: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = {name: value for name, value in make_sample(2).items() if name != "txt"}
    shard = write_samples(tmp_path / "s.tar", [make_sample(0), bare, {"__key__": "bad", "mp4": b"no", "txt": b"x"}])
    monkeypatch.chdir(tmp_path)
    text = page(
        monkeypatch, tmp_path / "page.html", shard, "experiment=demo_vae", "data.slots=1", "data.max_pixels=1024"
    )
    assert "2 usable samples" in text and "shards</td><td>1</td><td>3</td><td>1 (not_a_video 1)</td>" in text
    assert text.count("<img") == 2 and "no_caption" not in text
    text = page(monkeypatch, tmp_path / "page.html", shard, *CONFIGURED[:1], "data.slots=1", "data.max_pixels=1024")
    assert "1 usable samples" in text and "no_caption" in text


@pytest.mark.parametrize("arguments", [[], ["x.tar"], ["fps=fast"], ["experiment=none"], ["experiment=demo", "fps=2"]])
def test_wrong_use_is_one_line(
    corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    shards = [] if not arguments else arguments if "x.tar" in arguments else [corpus[0], "out=/nowhere/p", *arguments]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["inspect", *shards])
    with pytest.raises(InputError):
        inspecting.main()
