"""Subwords: the same captions give the same tokenizer, no text is unknown, and a wrong file is named in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sora_train.core.cli import InputError
from sora_train.models.text.subwords import load_subwords, tokenize_subwords, train_subwords
from tests.documented import ROOT

CAPTIONS = [f"a {colour} {shape} moves {way}" for colour in ("red", "green", "blue") for shape in ("ring", "square")
            for way in ("left", "right", "up", "down")]  # fmt: skip


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("subwords") / "tokenizer.json"
    path.write_text(train_subwords(CAPTIONS, 400))
    return str(path)


def test_frequent_words_are_one_token_and_nothing_is_unknown(file: str) -> None:
    captions = ["A red ring moves left", "", "Крокодил 17 🦎", "ring" * 40]
    ids_L1, lengths = tokenize_subwords(file, captions, 64)
    assert ids_L1.shape == (sum(lengths), 1) and ids_L1.dtype == torch.long
    assert lengths[:2] == (6, 1), "a start token, and one for each word"
    first, empty, strange, _ = ids_L1.split(lengths)
    assert first[0] == empty[0] == strange[0] and lengths[3] == 64
    vocabulary = json.loads(Path(file).read_text())["model"]["vocab"]
    assert len(set(vocabulary.values())) == len(vocabulary) <= 400 and int(ids_L1.max()) < 400
    assert {"Ġred", "Ġring", "Ġmoves"} <= set(vocabulary)
    # bytes give every text back, but for case and spaces before digits
    back = load_subwords(file)
    pieces = "".join(back.id_to_token(int(n)) for n in strange[1:])
    assert len(pieces.replace("Ġ", "")) == len("крокодил17🦎".encode())


def test_the_same_captions_give_the_same_file_in_another_process(file: str) -> None:
    script = (
        "from tests.models.text.test_subwords import CAPTIONS\n"
        "from sora_train.models.text.subwords import train_subwords\n"
        "print(train_subwords(CAPTIONS, 400), end='')"
    )
    other = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=280, check=True,
        env=os.environ | {"PYTHONHASHSEED": "7"},
    ).stdout  # fmt: skip
    assert other == Path(file).read_text()
    assert train_subwords(CAPTIONS[::-1], 400) == other, "nor does their order matter"


def test_a_wrong_file_is_named(tmp_path: Path) -> None:
    for content, message in ((None, "is missing"), ("{", "can't be read"), (_other(), "another kind")):
        path = tmp_path / f"{message[:3]}.json"
        if content is not None:
            path.write_text(content)
        with pytest.raises(InputError, match=message):
            load_subwords(str(path))


def _other() -> str:
    from tokenizers import Tokenizer, models

    return Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).to_str()
