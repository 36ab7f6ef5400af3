"""Prompts are rewritten by a server before sampling: stored with the sample, checked, and asked for once."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sora_train.config.schema import Config
from sora_train.core.cli import InputError
from sora_train.core.media import read_mp4
from sora_train.generation.expansion import captions_of
from tests.data_tools.curation.caption_stub import serve

Give = Callable[..., None]
WORDING = "Coloured discs drift over a field of soft patches."  # the stub's plain answer


def options(path: str) -> dict[str, Any]:
    return dict(json.loads(Path(path).read_bytes())["options"])


def test_the_rewritten_prompt_is_stored_and_makes_the_sample_again(sample: Give) -> None:
    with serve(["503", "refusal", "plain"]) as stub:
        asked = ("prompt=discs", "expand=true", f"expand_url={stub.url}", "out=a.mp4")
        sample(*asked)
        said = options("a.json")
        assert said["prompt"] == WORDING and said["expanded_from"] == "discs"
        assert not {"expand", "expand_url", "expand_model"} & said.keys()
        assert "Prompt: discs" in stub.requests[-1]["messages"][0]["content"]
        count = len(stub.requests)
        sample(*asked)
        assert len(stub.requests) == count == 3, "what was asked once isn't asked again"
    first = read_mp4("a.mp4")[0]
    sample("from=a.json", "out=b.mp4")  # without a server
    assert np.array_equal(read_mp4("b.mp4")[0], first) and options("b.json")["expanded_from"] == "discs"


def test_each_prompt_of_a_file_is_rewritten(sample: Give) -> None:
    Path("p.txt").write_text("one\ntwo\n")
    with serve(["plain", "plain"]) as stub:
        sample("prompts=p.txt", "expand=true", f"expand_url={stub.url}", "out=made")
    assert [options(f"made/{n:04d}.json")["expanded_from"] for n in (0, 1)] == ["one", "two"]


@pytest.mark.parametrize(
    ("faults", "more", "says"),
    [
        (["refusal"] * 3, (), "gives no other wording of 'discs': refusal"),
        (["length"] * 3, (), "gives no other wording of 'discs': cut off"),
        (["404"], (), "gives no other wording of 'discs': refused by the server"),
        ([], ("expand_model=other",), "expand_url=.*: model other isn't there; it has stub"),
    ],
)
def test_no_answer_that_can_be_used_is_one_line(
    sample: Give, faults: list[str], more: tuple[str, ...], says: str
) -> None:
    with serve(faults) as stub, pytest.raises(InputError, match=says):
        sample("prompt=discs", "expand=true", f"expand_url={stub.url}", "out=a.mp4", *more)
    assert not Path("a.mp4").exists()


def test_shots_are_left_as_they_are(sample: Give) -> None:
    with pytest.raises(InputError, match="shots and held-out captions stay"):
        sample('shots=[{"seconds": 1, "caption": "one"}]', "expand=true")


def test_examples_are_captions_of_the_training_shards(config: Config, corpus: list[str]) -> None:
    source = next(iter(config.data.sources.values()))
    there = replace(config, data=replace(config.data, sources={"demo": replace(source, shards=corpus[:1])}))
    found = captions_of(there)
    assert len(found) == 6 and found[0] == "block number 0" and "a block of light, number 1" in found
    gone = replace(config, data=replace(config.data, sources={"demo": replace(source, shards=["gone.tar"])}))
    assert captions_of(gone) == []
