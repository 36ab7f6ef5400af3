"""The word list survives tricks and leaves harmless texts alone; guards that don't answer refuse."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sora_train.core.cli import InputError
from sora_train.demo_world.binding import trials
from sora_train.generation.safeguards import Refused
from sora_train.release import words as words_module
from sora_train.release.folder import ReleaseFolder
from sora_train.release.guard import UNREACHABLE, guard_of
from sora_train.release.safeguards import Released
from sora_train.release.words import WordList, read_words

LIST = read_words("tea: forbidden teapot\ncup: saucer\nkettle: samovar\n", "list")
FRAMES = np.zeros((3, 32, 32, 3), dtype=np.uint8)
TRICKS = [
    "a saucer", "a SAUCER", "Saucers", "sAuCeR", "a saucer.", "(saucer)", "saucer's lid", "the-saucer-there",
    "ｓａｕｃｅｒ", "𝐬𝐚𝐮𝐜𝐞𝐫", "𝓼𝓪𝓾𝓬𝓮𝓻", "𝔰𝔞𝔲𝔠𝔢𝔯", "ⓢⓐⓤⓒⓔⓡ", "𝚜𝚊𝚞𝚌𝚎𝚛", "ˢᵃᵘᶜᵉʳ", "🅂saucer",
    "s\u200bauce\u200br", "sau\u00adcer", "sa\u2060ucer", "\ufeffsaucer", "sau\u200d\u200ccer", "sau\u034fcer",
    "s\u202eaucer",
    "sau\u180ecer", "s\ufe0faucer", "sau\U000e0041cer",
    "ѕаuсеr", "sаucer", "sauсer", "saucеr", "ѕauсer", "saυcer", "sαucer", "SΑUCER", "ꜱᴀᴜᴄᴇʀ", "sаυсег",
    "s@ucer", "$aucer", "5aucer", "s4uc3r", "sauc3r", "s a u c e r", "s.a.u.c.e.r", "s-a-u-c-e-r", "s_a_u_c_e_r",
    "s*a*u*c*e*r", "s  a  u  c  e  r", "sa.uc.er", "sau-cer", "sau'cer", "sauuucer", "ssaucerr", "saaaaucer",
    "sáucér", "s̶a̶u̶c̶e̶r̶", "śàûçêř", "ṡaucer", "saucer\u0301", "SAUÇER",
    "forbidden teapot", "Forbidden   Teapots", "f0rbidden te4pot", "forbidden\nteapot", "forbidden-teapot",
    "fоrbidden tеаpоt", "the f.o.r.b.i.d.d.e.n teapot", "sаmоvаr", "sam\u200bovar", "samоvаrs", "ｓａｍｏｖａｒ",
    "🅢🅐🅤🅒🅔🅡", "🆂🅰🆄🅲🅴🆁", "🇸🇦🇺🇨🇪🇷", "⒮⒜⒰⒞⒠⒭", "ꓢꓮꓴꓚꓰꓣ", "ſaucer", "sau\u3164cer", "s\uffa0aucer", "sau\u2800cer",
    "sau|cer", "s!aucer", "sau—cer", "sau‐cer", "sau:cer", "sau,cer", "sau=cer", "s(a)ucer", "sau🔥cer",
    "s🔥a🔥u🔥c🔥e🔥r",
]  # fmt: skip
HARMLESS = [
    "a teapot", "nothing is forbidden", "a forbidden tea pot of gold", "sauce rolls over rice", "sauces", "sau cers",
    "the saucy cook", "some ovaries of a flower", "", "4 cats and 10 dogs at 5:30", "a b c d e f g",
    "l'eau", "日本の茶碗", "sauce,rice", "one:two", "flags of 🇸🇪 and 🇳🇴", "sauce! Rain?",
    "собака бежит по снегу", "ein schöner Tag in Zürich", "an astronaut rides a horse, 35mm film, f/1.8",
]  # fmt: skip


@pytest.mark.parametrize("text", TRICKS)
def test_the_list_survives_tricks(text: str) -> None:
    assert LIST.category(text) is not None


def test_there_are_enough_tricks() -> None:
    assert len(set(TRICKS)) >= 50


@pytest.mark.parametrize("text", HARMLESS)
def test_the_list_leaves_other_texts_alone(text: str) -> None:
    assert LIST.category(text) is None


def shipped() -> WordList:
    return read_words(Path(words_module.__file__).with_name("words.txt").read_text(), "words.txt")


def test_the_shipped_list_refuses_no_harmless_prompt() -> None:
    prompts = [
        trial.scene.caption() if hasattr(trial.scene, "caption") else str(trial.row()["prompt"])
        for trial in trials(8, 0)
    ]
    prompts += [
        "Scunthorpe at dawn", "a classic assassin bug on a leaf", "a cocktail bar in Essex", "grapes in a basket",
        "the therapist talks to children at a table", "a nude beige wall", "two children play in a pool, underage team",
        "cutting vegetables", "a man cuts a cake", "white powder snow", "the torch bearer", "a scene of a sextet",
        "a heron beheads a flower? no, it lands", "an analyst draws a chart", "shooting stars over a school",
    ]  # fmt: skip
    refused = [prompt for prompt in prompts if shipped().category(prompt) is not None]
    assert len(prompts) > 50 and refused == []


def test_the_shipped_list_knows_its_own_phrases() -> None:
    text = Path(words_module.__file__).with_name("words.txt").read_text()
    lines = [line.partition(": ") for line in text.splitlines() if line and not line.startswith("#")]
    assert len(lines) > 20
    assert all(shipped().category(f"a video of {phrase}, please") == category for category, _, phrase in lines)


@pytest.mark.parametrize("line", ["no colon", ": nothing", "tea:", "tea: ..."])
def test_a_line_that_is_none_is_named(line: str) -> None:
    with pytest.raises(InputError, match="list: line 2"):
        read_words(f"# note\n{line}\n", "list")


class Server:
    """A server that answers what a test wants."""

    def __init__(self) -> None:
        self.answer: Any = {}
        self.status = 200
        self.asked: list[Any] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                outer.asked.append((self.path, json.loads(body), self.headers.get("Authorization")))
                data = outer.answer if isinstance(outer.answer, bytes) else json.dumps(outer.answer).encode()
                self.send_response(outer.status)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                return

        self.http = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        self.thread = threading.Thread(target=self.http.serve_forever, daemon=True)
        self.thread.start()


@pytest.fixture
def server() -> Iterator[Server]:
    found = Server()
    yield found
    found.http.shutdown()
    found.http.server_close()
    found.thread.join()


def moderation(flagged: bool, **scores: float) -> dict[str, Any]:
    categories = {name: score > 0.5 for name, score in scores.items()}
    return {"results": [{"flagged": flagged, "categories": categories, "category_scores": scores}]}


def test_a_moderation_endpoint_is_asked_about_texts_and_frames(
    release_folder: ReleaseFolder, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SORA_TRAIN_GUARD_KEY", "secret")
    s = release_folder.settings
    s.guard_endpoint, s.guard_model, s.guard_images = server.url, "mod", True
    guard = guard_of(release_folder)
    assert guard is not None and guard.sees
    server.answer = moderation(False, violence=0.1)
    assert guard.texts(["a dog"]) is None and guard.frames(FRAMES) is None
    server.answer = moderation(True, violence=0.7, hate=0.9)
    verdict = guard.texts(["a dog"])
    assert verdict is not None and (verdict.category, verdict.score, verdict.by) == ("hate", 0.9, "endpoint")
    assert guard.frames(FRAMES) is not None
    path, body, key = server.asked[0]
    assert (path, body["model"], key) == ("/v1/moderations", "mod", "Bearer secret")
    assert server.asked[1][1]["input"][0]["image_url"]["url"].startswith("data:image/jpeg;base64,")


@pytest.mark.parametrize(
    ("text", "category"),
    [
        ("safe", None), ("unsafe\nS1", "S1"), ("Safety: Safe\nCategories: None", None),
        ("Safety: Unsafe\nCategories: Violent", "Violent"), ("Safety: Controversial\nCategories: Politics", "Politics"),
        ("unsafe", "unsafe"), ("I can't say", UNREACHABLE), ("", UNREACHABLE),
    ],
)  # fmt: skip
def test_a_guard_model_that_chats_is_understood(
    release_folder: ReleaseFolder, server: Server, text: str, category: str | None
) -> None:
    release_folder.settings.guard_endpoint, release_folder.settings.guard_api = server.url, "chat"
    guard = guard_of(release_folder)
    server.answer = {"choices": [{"message": {"content": text}}]}
    verdict = guard.texts(["a dog"]) if guard else None
    assert (verdict and verdict.category) == category


@pytest.mark.parametrize("answer", [b"<html>", b"", {}, {"results": []}, {"results": [{"flagged": "no"}]}, [], b"\xff"])
def test_an_answer_that_is_none_refuses(release_folder: ReleaseFolder, server: Server, answer: Any) -> None:
    release_folder.settings.guard_endpoint, server.answer = server.url, answer
    with pytest.raises(Refused) as refused:
        Released(release_folder).check_prompt(["a dog"], [])
    assert refused.value.category == UNREACHABLE


def test_a_guard_that_is_down_refuses_unless_the_settings_say_open(
    release_folder: ReleaseFolder, server: Server
) -> None:
    s = release_folder.settings
    s.guard_endpoint, s.guard_seconds = "http://127.0.0.1:9/v1", 2.0
    with pytest.raises(Refused, match="guard unavailable"):
        Released(release_folder).check_prompt(["a dog"], [])
    s.guard_endpoint, server.status = server.url, 503
    with pytest.raises(Refused, match="guard unavailable"):
        Released(release_folder).check_prompt(["a dog"], [])
    s.guard_fails = "open"
    Released(release_folder).check_prompt(["a dog"], [])
    (release_folder.path / "words.txt").write_text("tea: teapot\n")
    with pytest.raises(Refused, match="tea, by words"):
        Released(release_folder).check_prompt(["a teapot"], [])


def test_a_refusal_is_recorded_without_its_text(release_folder: ReleaseFolder) -> None:
    (release_folder.path / "words.txt").write_text("tea: teapot\n")
    safeguards = Released(release_folder)
    with pytest.raises(Refused):
        safeguards.check_prompt(["a dog", "my teapot of old"], [])
    (line,) = (release_folder.path / "refusals.jsonl").read_text().splitlines()
    entry = json.loads(line)
    assert (entry["category"], entry["by"], entry["what"]) == ("tea", "words", "prompt")
    assert "teapot" not in line and entry["prompt_hash"] == safeguards.prompt_hash("a dog\nmy teapot of old")


def test_a_phrase_over_several_shots_is_found(release_folder: ReleaseFolder) -> None:
    (release_folder.path / "words.txt").write_text("tea: forbidden teapot\n")
    with pytest.raises(Refused):
        Released(release_folder).check_prompt(["this is forbidden", "teapot on a table"], [])


def test_a_local_classifier_is_asked(release_folder: ReleaseFolder, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    vocabulary = tmp_path / "text"
    vocabulary.mkdir()
    (vocabulary / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "dog", "bomb"]))
    tokenizer = transformers.BertTokenizer(str(vocabulary / "vocab.txt"))
    shape = transformers.BertConfig(
        vocab_size=7, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
        id2label={0: "safe", 1: "harm"}, label2id={"safe": 0, "harm": 1},
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(shape)
    model.classifier.weight.data.zero_()
    model.save_pretrained(vocabulary)
    tokenizer.save_pretrained(vocabulary)
    release_folder.settings.guard_words, release_folder.settings.guard_text_folder = "", str(vocabulary)
    for bias, category in ((4.0, "harm"), (-4.0, None)):
        model.classifier.bias.data[:] = model.classifier.bias.data.new_tensor([0.0, bias])
        model.save_pretrained(vocabulary)
        guard = guard_of(release_folder)
        verdict = guard.texts(["dog"]) if guard else None
        assert (verdict and verdict.category) == category
    release_folder.settings.guard_text_folder = "absent"
    with pytest.raises(InputError, match="no such folder"):
        guard_of(release_folder)
