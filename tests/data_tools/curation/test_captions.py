"""Captions by a server that fails as servers do: none lost, none twice, no refusal or loop believed."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_tools.curation import captions
from data_tools.curation.caption_text import read_answer
from data_tools.curation.engine import take_through
from data_tools.curation.ledger import Ledger
from sora_train.core.chat_server import Server
from sora_train.core.cli import InputError
from sora_train.core.model_text import BadText, checked
from tests.data_tools.curation import films
from tests.data_tools.curation.caption_stub import GOOD, serve
from tests.data_tools.curation.outputs import lines, samples


def clips(out: Path, count: int) -> list[dict[str, Any]]:
    """Clips that were cut, with pictures for their captions."""
    folder = out / "work" / "cut"
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for number in range(count):
        name = f"{number}.stills.npz"
        np.savez(folder / name, *[np.frombuffer(b"\xff\xd8 a picture", np.uint8)] * 2)
        found.append({"id": str(number), "key": str(number), "digest": str(number), "stills": name})
    return found


def ask(url: str, out: Path, items: list[dict[str, Any]], timeout_s: float = 30.0) -> list[dict[str, Any]]:
    """The outcomes of asking for captions."""
    server = Server(url, None, timeout_s, pause_s=0.001)
    try:
        return [outcome for _, outcome in take_through(captions.stage(server), items, Ledger(out), captions.Threads(4))]
    finally:
        server.close()


def test_faults_of_a_third_of_the_answers_lose_nothing(tmp_path: Path) -> None:
    rng = random.Random(0)
    kinds = ["503", "429", "html", "drop", "garbage", "refusal", "loop", "length", "500"]
    faults = [rng.choice(kinds) if rng.random() < 0.3 else "ok" for _ in range(200)]
    items = clips(tmp_path, 60)
    with serve(faults) as stub:
        first = ask(stub.url, tmp_path, items)
        bad = [o for o in first if "kept" not in o]
        stub.faults.clear()
        asked = len(stub.requests)
        again = ask(stub.url, tmp_path, [item for item, o in zip(items, first, strict=True) if "dropped" not in o])
        assert len(stub.requests) - asked == sum("failed" in o for o in first)
    assert all("kept" in o for o in again) and len(bad) <= 6
    assert all(o["kept"]["captions"]["short"] == GOOD["short"] for o in again)
    rows = lines(tmp_path / "ledger/captions.jsonl")
    done = Counter(row["id"] for row in rows if "failed" not in row)
    assert set(done) == {item["id"] for item in items} and set(done.values()) == {1}


def test_what_a_request_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with serve() as stub:
        [outcome] = ask(stub.url, tmp_path, clips(tmp_path, 1))
    [body] = stub.requests
    assert body["model"] == "stub" and body["temperature"] == 0
    parts = body["messages"][0]["content"]
    assert [part["type"] for part in parts] == ["text", "image_url", "image_url"]
    assert parts[1]["image_url"]["url"].startswith("data:image/jpeg;base64,") and stub.keys == {"Bearer sk-secret"}
    assert outcome["kept"]["about"] == {"subject": "coloured discs", "camera": "glides to one side"}
    assert "sk-secret" not in (tmp_path / "ledger/captions.jsonl").read_text()


def test_a_refusal_is_dropped_and_a_dead_server_is_asked_again(tmp_path: Path) -> None:
    with serve(["refusal"] * 3) as stub:
        [refused] = ask(stub.url, tmp_path, clips(tmp_path, 1))
        assert refused["dropped"][0] == "no caption" and "refusal" in refused["dropped"][1]
        [known] = ask(stub.url, tmp_path, clips(tmp_path, 1))
        assert known == refused and len(stub.requests) == 3
    with serve(["400"]) as stub:
        items = clips(tmp_path, 2)[1:]
        assert "refused by the server" in ask(stub.url, tmp_path, items)[0]["dropped"][1]
    with serve(["drop"] * 500) as stub:
        outcomes = ask(stub.url, tmp_path, [item | {"digest": "other"} for item in clips(tmp_path, 30)])
        assert all(o["failed"][0] == "no answer" for o in outcomes) and len(stub.requests) < 60
    with serve(["slow"] * 6) as stub:
        [late] = ask(stub.url, tmp_path, clips(tmp_path, 4)[3:], timeout_s=0.5)
        assert late["failed"][0] == "no answer" and "Timeout" in late["failed"][1]
    with pytest.raises(InputError, match="no server with OpenAI's interface answers"):
        Server(stub.url, None)


def test_answers_are_read_and_checked() -> None:
    found = read_answer(f"Here it is:\n```json\n{json.dumps(GOOD)}\n```")
    assert set(found["captions"]) == {"short", "medium", "long"} and found["about"]["subject"] == "coloured discs"
    assert read_answer("A red ball rolls down a hill.")["captions"] == {"long": "A red ball rolls down a hill."}
    assert checked("short", "The video shows a red ball on a hill.") == "A red ball on a hill."
    assert checked("long", "In this clip, a red ball rolls down.") == "A red ball rolls down."
    assert checked("long", "This ball rolls down a green hill.") == "This ball rolls down a green hill."
    for text, kind in {
        "I'm sorry, I can't describe people.": "refusal", "As an AI language model I see nothing here.": "refusal",
        "red": "length", "word " * 500: "length",
        "the ball rolls over the hill and " * 8: "repetition",
    }.items():  # fmt: skip
        with pytest.raises(BadText) as caught:
            checked("long", text)
        assert caught.value.kind == kind
    for text in ('{"short": "cut', '{"colour": "red"}', "{}"):
        with pytest.raises(BadText):
            read_answer(text)


def test_clips_get_the_captions_of_a_server(tmp_path: Path, curated: Callable[..., int]) -> None:
    out = tmp_path / "out"
    films.write(tmp_path / "raw/film.mp4", films.joined([films.shot(50, 30), films.shot(51, 30)]).frames_THWC)
    with serve(["503", "garbage", "refusal"]) as stub:
        assert curated(tmp_path / "raw", out, f"captions={stub.url}", "stills=3", "licence=CC0-1.0") == 0
        assert all(len(body["messages"][0]["content"]) == 4 for body in stub.requests)
    found = samples(out)
    assert len(found) == 2 and all(s["json"]["captions"]["short"] == GOOD["short"] for s in found)
    assert all(s["json"]["about_camera"] == GOOD["camera"] and s["json"]["source"] for s in found)
    assert not list((out / "work/cut").iterdir())
