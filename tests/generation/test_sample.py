"""Every task, format and option of the command makes its files, and what is wrong is said before anything is made."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from sora_train import evaluate, export
from sora_train.config.schema import Config
from sora_train.core.cli import InputError
from sora_train.core.media import read_mp4, write_mp4
from sora_train.generation.sampler import Sampler
from sora_train.methods.base import Network
from sora_train.models.video_model import build_video_model
from sora_train.operations import source
from sora_train.operations.trained import load_starting_weights, trained_weights

Give = Callable[..., None]


def about(path: str | Path) -> dict[str, Any]:
    return json.loads(Path(path).read_bytes())


@pytest.fixture
def frames(tmp_path: Path) -> np.ndarray:
    """Twelve frames as clip.mp4 at 4 a second (the demo's rate), the first of them as first.png."""
    made = np.random.default_rng(0).integers(0, 255, (12, 24, 24, 3), dtype=np.uint8)
    write_mp4(tmp_path / "clip.mp4", made, 4.0)
    Image.fromarray(made[0]).save(tmp_path / "first.png")
    return made


SHOTS = 'shots=[{"seconds": 1, "caption": "one"}, {"seconds": 1.25, "caption": "two"}]'
TASKS: dict[str, tuple[list[str], int]] = {
    "text": ([], 9),
    "empty": (["prompt="], 9),
    "image": (["image=first.png"], 9),
    "extension": (["video=clip.mp4"], 12 - 3 + 9),  # two latent frames of five are given
    "backwards": (["end_video=clip.mp4"], 9 + 12 - 5),
    "last frame": (["end_image=first.png"], 9),
    "between images": (["image=first.png", "end_image=first.png"], 9),
    "between videos": (["video=clip.mp4", "end_video=clip.mp4"], 12 - 1 + 9 + 12 - 3),
    "video to video": (["video=clip.mp4", "strength=0.5"], 9),
    "shots": ([SHOTS], 9),
    "long": (["seconds=5", "overlap=1"], 19),
    "long from a video": (["seconds=5", "overlap=1", "video=clip.mp4"], 12 + 19),
    "long at once": (["seconds=5", "whole=true"], 19),
    "loop": (["loop=true", "overlap=1"], 8 + 6),
    "loop of an image": (["loop=true", "overlap=1", "image=first.png"], 1 + 8 + 5),
}


@pytest.mark.filterwarnings("ignore")
def test_every_task_of_the_command_line(sample: Give, frames: np.ndarray) -> None:
    for name, (options, length) in TASKS.items():
        prompt = [] if name == "shots" else ["prompt=a block"]
        sample(*prompt, *options, f"out={name}.mp4")
        video, fps = read_mp4(f"{name}.mp4")
        assert (name, len(video), fps) == (name, length, 4.0)
        assert about(f"{name}.json")["file"] == f"{name}.mp4" and Path(f"{name}-sheet.png").is_file()


def test_a_given_video_is_shown_before_the_clip(sample: Give) -> None:
    ramp = np.arange(12, dtype=np.uint8)[:, None, None, None] * 20
    write_mp4("clip.mp4", np.broadcast_to(ramp, (12, 24, 24, 3)), 4.0)
    sample("prompt=a", "video=clip.mp4", "out=on.mp4")
    seen = read_mp4("on.mp4")[0][:9].mean(axis=(1, 2, 3))
    assert np.abs(seen - 20 * np.arange(9)).max() < 3, "the nine frames that don't fit into half a clip"


@pytest.mark.parametrize(
    ("options", "files"),
    [
        (["out=a.mp4"], ["a.mp4"]), (["out=a.webm"], ["a.webm"]), (["out=a.gif"], ["a.gif"]),
        (["out=v1.5"], ["v1.5.mp4"]),
        (["out=a", "format=gif"], ["a.gif"]), (["out=A.MP4"], ["A.mp4"]), (["out=a.mp4", "seconds=0.1"], ["a.png"]),
        (["out=a.png", "seconds=0.1"], ["a.png"]), (["out=sub/deep/a"], ["sub/deep/a.mp4"]),
        (["out=a.mp4", "count=2"], ["a-0.mp4", "a-1.mp4"]), (["out=v1.5", "count=2"], ["v1.5-0.mp4", "v1.5-1.mp4"]),
        (["out=a", "format=frames"], [f"a/{n:05d}.png" for n in range(9)]), (["out=2024_11"], ["2024_11.mp4"]),
        (["out=clips/", "seed=7"], ["clips/7.mp4"]), (["out=#1: a"], ["#1: a.mp4"]), (["out=红"], ["红.mp4"]),
    ],
)  # fmt: skip
def test_out_names_the_file(sample: Give, tmp_path: Path, options: list[str], files: list[str]) -> None:
    sample("prompt=a", *options)
    found = [p for p in tmp_path.rglob("*") if p.suffix in (".mp4", ".webm", ".gif", ".png") and "sheet" not in p.name]
    assert sorted(p.relative_to(tmp_path).as_posix() for p in found) == sorted(files)


def test_formats_hold_the_frames_at_the_rate_asked_for(sample: Give) -> None:
    sample("prompt=a", "out=a.mp4", "crf=0", "fps=10")
    sample("prompt=a", "out=b.webm", "crf=4")
    sample("prompt=a", "out=c.gif", "fps=3")
    sample("prompt=a", "out=d", "format=frames")
    exact = np.stack([np.asarray(Image.open(f"d/{n:05d}.png")) for n in range(9)]).astype(int)
    (mp4, fast), (webm, usual) = read_mp4("a.mp4"), read_mp4("b.webm")
    assert (fast, usual, len(mp4), len(webm)) == (10.0, 4.0, 9, 9)
    gif = Image.open("c.gif")
    shown = []
    for n in range(gif.n_frames):
        gif.seek(n)
        shown.append(gif.info["duration"])
    assert (sum(shown), len(shown), gif.info["loop"]) == (3000, 9, 0)
    brightness = (0.299, 0.587, 0.114)  # colour is stored at half the resolution
    assert all(np.abs((other - exact) @ brightness).mean() < 4 for other in (mp4, webm))
    assert np.abs((mp4[1:] - exact[:-1]) @ brightness).mean() > 20, "another frame is not taken for it"


REFUSED = {
    "out=a.avi": r"samples are \.mp4", "out=a.mov": r"samples are \.mp4", "out=.": "is a folder",
    "crf=60": "at most 51",
    "format=avi": "known: frames, gif, mp4", "height=-48": "at least 1", "width=0": "at least 1",
    "count=-2": "at least 1",
    "guidance=nan": "a number", "steps=0": "at least 1", "seconds=0": "above 0", "strength=2": "at most 1",
    "strength=0.5": "give video=", "image=none.png": "there is no file none.png",
    "checkpoint=7": "has no checkpoint=7; it",
    "lora=none.safetensors": "there is no such file", "seed=1.5": "whole number", "promt=x": "did you mean 'prompt'",
    "solver=rk": "known: adams_bashforth", "rope_factors=[2,1]": "three", "prompts=none.txt": "not both",
    "height=16000 width=16000": "data.limits.pixels", "out=a.png": "a PNG holds one frame",
    "guidance=1 negative=x": "says nothing", "guidance_interval=[1,0]": "the lower one first",
    "guidance_interval=0.5": "must be two timesteps",
    "overlap=3 seconds=20": "at most 2", "out=a.gif format=mp4": "differ", "format=gif crf=3": "gif has no crf",
    "end_image=first.png loop=true": "can't end in what is given", "image=first.png video=clip.mp4": "not both",
    "image=first.png seconds=0.1": "one frame has no room", "loop=perhaps": "true or false",
}  # fmt: skip


@pytest.mark.parametrize("options", REFUSED)
def test_what_is_wrong_is_said_in_one_line(sample: Give, frames: np.ndarray, options: str) -> None:
    with pytest.raises(InputError, match=REFUSED[options]) as refused:
        sample("prompt=a", *options.split())
    assert "\n" not in str(refused.value)
    assert not Path("run/samples").exists()


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Captions that reached the network; what it would have made is grey."""
    captions: list[str] = []

    def videos(self: Sampler, requests: Any) -> list[np.ndarray]:
        captions.extend(request.caption for request in requests)
        return [np.full((3, 24, 24, 3), 128, np.uint8) for _ in requests]

    monkeypatch.setattr(Sampler, "videos", videos)
    return captions


def once(work: Callable[..., Any]) -> Callable[..., Any]:
    """Does the work the first time, and keeps what came of it."""
    kept: list[Any] = []
    return lambda *arguments: (kept or kept.append(work(*arguments)) or kept)[0]


@pytest.mark.parametrize("count", [30, pytest.param(300, marks=pytest.mark.campaign)])
def test_prompts_of_a_fuzzer_reach_the_json_byte_for_byte(
    sample: Give, drawn: list[str], monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    for name in ("model_config", "fixed", "fingerprint", "load_sampler"):  # what isn't about the prompt takes long
        monkeypatch.setattr(source, name, once(getattr(source, name)))

    @settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.text(st.characters(exclude_characters="\0", codec="utf-8")))
    def reaches(text: str) -> None:
        drawn.clear()
        sample(f"prompt={text}", "out=a.mp4")
        raw = Path("a.json").read_bytes()
        assert json.loads(raw)["prompt"].encode() == text.encode() == json.loads(raw)["options"]["prompt"].encode()
        assert drawn == [text]
        sample("from=a.json")
        assert drawn == [text, text] and Path("a.json").read_bytes() == raw

    reaches()


def test_the_json_alone_makes_the_same_video_again(sample: Give, frames: np.ndarray, tmp_path: Path) -> None:
    sample("prompt=a: b #1", "negative=no", "image=first.png", "guidance=2.5", "steps=2", "solver=heun", "seed=7",
           "seconds=1.5", "height=24", "shift=3", "checkpoint=1", "weights=raw", "out=one.mp4", "count=2")  # fmt: skip
    before = {name: Path(name).read_bytes() for name in ("one-1.mp4", "one-1.json", "one-0.mp4")}
    assert before["one-1.mp4"] != before["one-0.mp4"]
    Path("one-1.mp4").unlink()
    other = tmp_path / "elsewhere"
    other.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(other)
        sample(f"from={tmp_path / 'one-1.json'}")
    assert {name: Path(name).read_bytes() for name in before} == before
    sample("from=one-1.json", "out=two.gif", "seed=9")
    changed = {"seed", "format"}
    first, second = about("one-1.json")["options"], about("two.json")["options"]
    assert {key for key in first if first[key] != second[key]} == changed


def test_other_weights_or_files_than_the_json_names_are_refused(sample: Give, frames: np.ndarray) -> None:
    sample("prompt=a", "image=first.png", "out=a.mp4")
    assert about("a.json")["options"]["checkpoint"] == 2
    Image.fromarray(frames[5]).save("first.png")
    with pytest.raises(InputError, match=r"a\.json was made from another image"):
        sample("from=a.json")
    sample("from=a.json", "image=first.png")
    vae = Path("vae/vae.safetensors")
    data = bytearray(vae.read_bytes())
    data[-1] ^= 1
    vae.write_bytes(data)
    with pytest.raises(InputError, match=r"a\.json was made from other weights"):
        sample("from=a.json")
    sample("from=a.json", "vae=vae")
    shutil.rmtree("run/checkpoints/step-00000002")
    with pytest.raises(InputError, match="has no checkpoint=2; it has 1"):
        sample("from=a.json")


def test_checkpoints_averages_and_precisions_differ(sample: Give) -> None:
    seen = set()
    for n, options in enumerate(([], ["checkpoint=1"], ["weights=raw"], ["dtype=bf16"])):
        sample("prompt=a", *options, f"out={n}", "format=frames")
        seen.add(Path(f"{n}/00008.png").read_bytes())
    sample("prompt=a", "checkpoint=2", "weights=ema", "dtype=fp32", "out=same", "format=frames")
    assert len(seen) == 4 and Path("same/00008.png").read_bytes() == Path("0/00008.png").read_bytes()


PROMPTS = {
    "p.txt": "a: red #1\r\n\n  two \r\n",
    "p.csv": 'prompt,seed,height,out,negative\n"a, ""b""",3,48,first,\nc,,,,blue\n',
    "p.jsonl": '{"prompt": "a", "seed": 5}\n\n{"shots": [{"seconds": 1, "caption": "b"}], "count": 2}\n',
}


def test_files_of_prompts(sample: Give) -> None:
    for name, text in PROMPTS.items():
        Path(name).write_text(text, newline="")
        sample(f"prompts={name}", f"out={name[2:]}")
    assert [about(f"txt/000{n}.json")["prompt"] for n in (0, 1)] == ["a: red #1", "  two "]
    first, second = about("csv/first.json"), about("csv/0001.json")
    assert (first["prompt"], first["seed"], first["options"]["height"]) == ('a, "b"', 3, 48)
    assert (second["seed"], second["options"]["negative"], first["options"]["negative"]) == (0, "blue", "")
    assert about("jsonl/0000.json")["seed"] == 5
    assert [about(f"jsonl/0001-{n}.json")["seed"] for n in (0, 1)] == [0, 1]


WRONG_PROMPTS = {
    "none.txt": (None, "can't be read"), "p.xlsx": ("x", "must be a .txt"), "p.txt": ("\n \n", "holds no prompt"),
    "a.csv": ("prompt,sed\na,1\n", "row 1 has 'sed'.*did you mean 'seed'"), "b.csv": ("prompt\na,b\n", "more cells"),
    "c.csv": ('prompt\n"a', "line"), "a.jsonl": ('{"prompt": 3}\n', "prompt=3 must be text"),
    "b.jsonl": ("{prompt: a}\n", "line 1 is not JSON"), "c.jsonl": ('{"seed": 1}\n', "row 1 must have a prompt"),
    "d.jsonl": ('{"prompt": "a", "out": "../b"}\n', "within the folder"), "e.jsonl": ("[1]\n", "not a JSON object"),
    "f.jsonl": ('{"prompt": "a", "height": -1}\n', "height=-1"),
    "g.jsonl": ('{"prompt": "a", "run_dir": "b"}', "run_dir"),
    "h.jsonl": ('{"prompt": "a", "out": "x"}\n{"prompt": "b", "out": "x"}\n', "2 rows have out=x"),
    "i.csv": ("prompt,image\na,none.png\n", "there is no file none.png"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_PROMPTS)
def test_a_wrong_file_of_prompts_is_refused_before_anything_is_made(sample: Give, name: str) -> None:
    text, message = WRONG_PROMPTS[name]
    if text is not None:
        Path(name).write_text(text)
    with pytest.raises(InputError, match=message):
        sample(f"prompts={name}", "out=made")
    assert not Path("made").exists()


def test_an_interrupted_batch_goes_on_where_it_was(
    sample: Give, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("p.txt").write_text("one\ntwo\nthree\n")
    made: list[str] = []
    whole = Sampler.videos

    def interrupted(self: Sampler, requests: Any) -> list[np.ndarray]:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(requests[0].caption)
        return whole(self, requests)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Sampler, "videos", interrupted)
        sample("prompts=p.txt", "out=made")
    assert sorted(p.name for p in Path("made").glob("*.mp4")) == ["0000.mp4", "0001.mp4"], "each as it was made"
    capsys.readouterr()
    Path("made/0001.mp4").unlink()
    sample("prompts=p.txt", "out=made")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[1:] for line in lines] == [["there", "already"], [], []] and len(lines) == 3
    sample("prompts=p.txt", "out=made", "seed=1")
    assert "there already" not in capsys.readouterr().out, "another seed is another sample"


def test_an_export_is_sampled_like_its_run(sample: Give, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["export", "run_dir=run", "out=given away", "format=safetensors"])
    assert export.main() == 0
    sample("prompt=a", "out=run.mp4")
    shutil.move("vae", "moved")
    sample("run_dir=given away", "prompt=a", "out=export.mp4")
    assert Path("run.mp4").read_bytes() == Path("export.mp4").read_bytes()
    with pytest.raises(InputError, match="is no run, so it has no checkpoint"):
        sample("run_dir=given away", "prompt=a", "checkpoint=2")
    with pytest.raises(InputError, match="no VAE at"):
        sample("prompt=a")
    sample("prompt=a", "vae=moved", "out=again.mp4")
    assert Path("again.mp4").read_bytes() == Path("run.mp4").read_bytes()
    weights = load_file("given away/model.safetensors")
    assert weights, "the export holds the network"


def test_an_export_is_evaluated_and_trained_from(
    sample: Give, config: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In its own folder, not in that of the run that it was made of, which may be gone."""
    monkeypatch.setattr(sys, "argv", ["export", "run_dir=run", "out=given", "format=safetensors"])
    assert export.main() == 0
    trained = trained_weights("run")
    shutil.move("run", "gone")
    Path("p.jsonl").write_text('{"video": "a", "prompt": "a block"}\n')
    monkeypatch.setattr(sys, "argv", ["evaluate", "run_dir=given", "prompts=p.jsonl", "count=1", "metrics=flicker"])
    assert evaluate.main() == 0
    assert Path("given/evaluation/p.json").is_file() and Path("given/samples/p/0000.mp4").is_file()
    assert not Path("run").exists()
    network = build_video_model(config)
    load_starting_weights({"video": Network(network, rates=[(network, 1.0)])}, "given")
    assert all(torch.equal(p, trained[name]) for name, p in network.named_parameters())


def test_a_run_is_found_from_another_folder(sample: Give, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace(f"{tmp_path}/vae", "vae"))
    (tmp_path / "far").mkdir()
    monkeypatch.chdir(tmp_path / "far")
    sample(f"run_dir={tmp_path / 'run'}", "prompt=a", "out=a.mp4")
    assert (tmp_path / "far" / "a.mp4").is_file()


def test_a_prompt_beyond_the_text_encoder_is_said(sample: Give, capsys: pytest.CaptureFixture[str]) -> None:
    sample("prompt=" + "word " * 200, "out=a.mp4")
    assert "201 tokens is cut at text_encoder.max_tokens=128" in capsys.readouterr().err
    sample("prompt=word", "out=a.mp4")
    assert "cut" not in capsys.readouterr().err


def test_one_side_brings_the_other_along(sample: Give) -> None:
    Image.new("RGB", (64, 32), "red").save("wide.png")
    for options, size in (
        (["height=48"], (48, 48)), (["width=24"], (24, 24)), (["image=wide.png", "height=24"], (24, 48)),
        (["image=wide.png", "width=24"], (12, 24)),
    ):  # fmt: skip
        sample("prompt=a", *options, "out=a.mp4")
        assert read_mp4("a.mp4")[0].shape[1:3] == size
