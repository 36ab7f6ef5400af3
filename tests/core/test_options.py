"""Options reach a command as they were typed, of the types and within the ranges that its dataclass states."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, fields
from enum import Enum
from importlib import import_module
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sora_train.core.cli import InputError
from sora_train.core.options import choice, named, number, options, options_and_overrides, options_and_paths, read

ROOT = Path(__file__).parents[2]


class Fit(Enum):
    crop = "crop"
    stretch = "stretch"


@dataclass
class Options:
    run_dir: str
    prompt: str | None = None
    source: str | None = named("from", None)
    count: int = number(1, least=1)
    side: int | None = number(None, least=1, most=64)
    guidance: float = number(3.0, least=0)
    strength: float = number(1.0, above=0, most=1)
    loop: bool = False
    fit: Fit = Fit.crop
    format: str | None = choice(("mp4", "gif"), None)
    shards: list[str] = number([])
    factors: list[float] | None = number(None, above=0)
    models: dict[str, str] = field(default_factory=dict)


def typed(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Options:
    monkeypatch.setattr(sys, "argv", ["tool", "run_dir=r", *arguments])
    return options(Options, "usage")


TEXTS = [
    "Anime style: a large red ring", "a: b: c", "#1 of the set", "a ring #1", "* star", "& and", "@home", "%", "!bang",
    "{curly}", "[list]", "[{seconds: 1, caption: x}]", "'single", '"double"', "|", "> fold", "\ttab", " space ", "",
    "no", "yes", "null", "~", "1e3", "010", "2024_11", "0x10",
    "???", "${oc.env:HOME}", "$HOME", "line\nline\r\n", "a\\nb",
    "红色的圆环", "🙂", "=", "a=b=c", "--help me", "\u2028",
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_what_was_typed(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    made = typed(monkeypatch, f"prompt={text}", f"from={text}")
    assert (made.prompt, made.source) == (text, text)


@pytest.mark.parametrize("folder", ["2024_11", "010", "yes", "1e3", "null", "a: b", "[x]", "lr=1e-3", "测试"])
def test_a_folder_is_named_as_it_was_typed(monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    monkeypatch.setattr(sys, "argv", ["tool", f"run_dir={folder}"])
    assert options(Options, "usage").run_dir == folder


@pytest.mark.parametrize("argument", ["run_dir=~/runs/x", "shards=[~/a/*.tar,b.tar]", "shards=['~/a.tar']"])
def test_a_home_that_the_shell_left_is_refused(monkeypatch: pytest.MonkeyPatch, argument: str) -> None:
    monkeypatch.setattr(sys, "argv", ["tool", "prompt=~/a prompt", argument])
    with pytest.raises(InputError, match=r"the shell leaves ~ there as it is; write \$HOME or the whole path"):
        options(Options, "usage")


@given(st.text(st.characters(exclude_characters="\0", codec="utf-8")))
def test_any_text_is_what_was_typed(text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        assert typed(patch, f"prompt={text}").prompt == text
        if text[:1] != "[":
            assert typed(patch, f"shards={text}").shards in ([text], [""], [])
        elif '"' not in text:
            assert typed(patch, f'shards=["{text}"]').shards == [text]


VALUES: list[tuple[str, Any]] = [
    ("count=3", 3), ("count=+3", 3), ("side=null", None), ("side=48", 48), ("guidance=0", 0.0), ("guidance=1e1", 10.0),
    ("loop=true", True), ("loop=False", False), ("loop=yes", True), ("loop=0", False), ("fit=stretch", Fit.stretch),
    ("format=gif", "gif"), ("format=null", None), ("shards=a.tar", ["a.tar"]), ("shards=[]", []),
    ("shards=[a.tar, b.tar]", ["a.tar", "b.tar"]), ("shards=[t-{0,1}.tar,[ab].tar]", ["t-{0,1}.tar", "[ab].tar"]),
    ("shards=['a,b', \"c \"]", ["a,b", "c "]), ("shards=[ab].tar", ["[ab].tar"]), ("shards=a, b", ["a, b"]),
    ("factors=[2,1,1]", [2.0, 1.0, 1.0]), ("factors=2", [2.0]),
]  # fmt: skip


@pytest.mark.parametrize(("argument", "value"), VALUES, ids=[argument for argument, _ in VALUES])
def test_a_value_is_of_its_type(monkeypatch: pytest.MonkeyPatch, argument: str, value: Any) -> None:
    assert getattr(typed(monkeypatch, argument), argument.partition("=")[0]) == value


REFUSED = {
    "count=0": "count=0 must be a whole number at least 1", "count=1.5": "whole number", "count=1_000": "whole number",
    "count=٣": "whole number",
    "count=": "whole number", "count=1\n2": r"'1\\n2'", "side=65": "at least 1 and at most 64",
    "side=-48": "at least 1", "guidance=nan": "must be a number at least 0", "guidance=inf": "must be a number",
    "guidance=1,5": "must be a number", "strength=0": "above 0 and at most 1", "strength=1.01": "at most 1",
    "loop=maybe": "true or false", "fit=crob": "did you mean 'crop'", "format=avi": "known: gif, mp4",
    "factors=[1,0]": "above 0", "factors=[1,,2]": "empty item", "shards=['a]": "a quote is not closed",
    "promt=x": "did you mean 'prompt'", "source=x": "no option 'source'", "prompt": "not of the form key=value",
    "--count=3": "no option '--count'", "prompt=\udcff": "prompt is not UTF-8 at character 0",
}  # fmt: skip


@pytest.mark.parametrize("argument", REFUSED)
def test_what_is_wrong_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch, argument: str) -> None:
    with pytest.raises(InputError, match=REFUSED[argument]) as refused:
        typed(monkeypatch, argument)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("{}", {}), ("{clip: /models/clip}", {"clip": "/models/clip"}), ("{a: x:y, b: z}", {"a": "x:y", "b": "z"}),
        ("{clip:x,image:y}", {"clip": "x", "image": "y"}),
    ],
)  # fmt: skip
def test_a_map_has_its_entries(monkeypatch: pytest.MonkeyPatch, text: str, found: dict[str, str]) -> None:
    assert typed(monkeypatch, f"models={text}").models == found


@pytest.mark.parametrize("text", ["clip", "{clip}", "{a: 1, a: 2}", "{: x}", "{a: }", "[a: b]"])
def test_no_map_is_one_line(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    with pytest.raises(InputError, match="must be a map"):
        typed(monkeypatch, f"models={text}")


def test_the_last_value_counts_and_lists_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    made = typed(monkeypatch, "prompt=a", "shards=[a,b]", "prompt=b", "shards=c")
    assert (made.prompt, made.shards) == ("b", ["a", "b", "c"])


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["tool"])
    with pytest.raises(InputError, match=r"missing: run_dir=\.\.\."):
        options(Options, "usage")
    monkeypatch.setattr(sys, "argv", ["tool", "run_dir= "])
    with pytest.raises(InputError, match="run_dir= is empty"):
        options(Options, "usage")


def test_values_of_a_file_are_held_to_the_same_rules() -> None:
    made = read(Options, {"run_dir": "r", "prompt": "no", "count": 2, "side": None, "shards": ["a"], "loop": True})
    assert (made.prompt, made.count, made.side, made.shards, made.loop) == ("no", 2, None, ["a"], True)
    for wrong in ({"prompt": 3}, {"count": 1.5}, {"count": True}, {"loop": 1}, {"shards": {"a": 1}}, {"strength": 2}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            read(Options, {"run_dir": "r", **wrong})


def test_paths_stand_beside_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    Path("odd=name").touch()
    paths = ["a.tar", "s3://b/day=1/*.tar", "odd=name"]
    monkeypatch.setattr(sys, "argv", ["tool", paths[0], "run_dir=r", *paths[1:]])
    made, rest = options_and_paths(Options, "usage")
    assert (made.run_dir, rest) == ("r", paths)
    for wrong in ("cuont=3", "-x"):
        monkeypatch.setattr(sys, "argv", ["tool", "run_dir=r", wrong])
        with pytest.raises(InputError):
            options_and_paths(Options, "usage")


@dataclass
class Beside:
    out: str = "x"


def test_overrides_are_left_to_hydra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["tool", "experiment=demo", "out=a: b", "optim.lr=1"])
    assert options_and_overrides(Beside, "usage", "runs/none").out == "a: b"
    assert sys.argv == ["tool", "experiment=demo", "optim.lr=1", "run_dir=runs/none"]
    monkeypatch.setattr(sys, "argv", ["tool", "run_dir=mine"])
    options_and_overrides(Beside, "usage", "runs/none")
    assert sys.argv == ["tool", "run_dir=mine"]


def test_help_is_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["tool", "--help"])
    with pytest.raises(SystemExit) as ended:
        options(Options, "how to use it")
    assert not ended.value.code and capsys.readouterr().out == "how to use it\n"


COMMANDS = (
    "sora_train.generation.options", "sora_train.evaluation.commands", "sora_train.compare", "sora_train.export",
    "sora_train.doctor", "sora_train.plan", "sora_train.serve", "sora_train.import_deepspeed",
    "sora_train.release.cards", "sora_train.release.redteam", "data_tools.build_shards", "data_tools.lint",
    "data_tools.inspect", "data_tools.encode_latents", "data_tools.index", "data_tools.make_demo",
    "data_tools.takedown",
)  # fmt: skip


@pytest.mark.parametrize("module", COMMANDS)
def test_every_number_of_every_command_has_a_range(module: str) -> None:
    schema = import_module(module).Options
    hints = get_type_hints(schema)
    numbers = [field for field in fields(schema) if {int, float} & {hints[field.name], *get_args(hints[field.name])}]
    assert [field.name for field in numbers if not field.metadata.get("limits")] == []
