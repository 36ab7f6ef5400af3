"""Damaged, lying and malicious files among the footage stop nothing: each is kept or named, the good film is there."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from data_tools.curation.ledger import read_lines
from sora_train.data.read.decode import VIDEOS
from tests.data_tools.curation import films
from tests.data_tools.curation.outputs import lines, samples
from tests.faults.bad_corpus import Listener
from tests.faults.bad_files import HARMLESS, MARKER, Corpus

WHOLE = ("no_caption", "empty_caption", "caption", "json", "pickle_as_json")  # what is wrong stands beside a good film


@pytest.mark.parametrize("each", [1, pytest.param(10, marks=[pytest.mark.campaign, pytest.mark.timeout(1200)])])
def test_bad_media_stop_nothing(each: int, tmp_path: Path, curated: Callable[..., int]) -> None:
    raw, out, listener, rng = tmp_path / "raw", tmp_path / "out", Listener(), random.Random(each)
    data = films.write(tmp_path / "film.mp4", films.shot(1, 30, height=72, width=128)).read_bytes()
    films.write(raw / "good.mp4", films.shot(2, 40))
    kinds: dict[str, str] = {}
    for kind, make in Corpus(data, tmp_path, listener.port).samples.items():
        for number in range(each):
            for extension, content in make(rng).items():
                if extension in VIDEOS:
                    kinds[f"{kind}-{number}.{extension}"] = kind
                (raw / f"{kind}-{number}.{extension}").write_bytes(content)
    assert curated(raw, out, "licence=CC0-1.0", "captions=none", "keep=motion >= 0") == 0
    dropped = {entry["film"]: entry["reason"] for entry in lines(out / "dropped.jsonl") if entry["unit"] == "film"}
    used = {str(entry["film"]) for entry in read_lines(out / "sources.jsonl")}
    assert used | set(dropped) == {"good.mp4", *kinds} and not used & set(dropped), "each in one place, none lost"
    assert "good.mp4" in {sample["json"]["film"] for sample in samples(out)}
    unfit = {name for name, kind in kinds.items() if kind not in HARMLESS and not kind.startswith(WHOLE)}
    assert not used & unfit
    assert not (tmp_path / MARKER).exists() and listener.calls() == 0
