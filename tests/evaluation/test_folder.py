"""Folders of videos judged by name, prompt files, and two evaluations compared clip by clip."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from sora_train import evaluate
from sora_train.core.cli import InputError
from sora_train.core.media import write_mp4
from sora_train.evaluation.folder import judge_folder, read_prompts, videos_in
from sora_train.evaluation.paired import differences, print_differences, read_evaluation
from sora_train.evaluation.registry import choose


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Ten clips in `real`, little noise on them in `good`, much in `bad`."""
    rng = np.random.default_rng(0)
    for n in range(10):
        ramp = np.linspace(0, 200, 32, dtype=np.float64)[None, :, None, None] + 20 * rng.random((1, 1, 1, 3))
        clip = np.broadcast_to(ramp + np.arange(5)[:, None, None, None] * 4, (5, 32, 32, 3))
        for name, noise in (("real", 0), ("good", 4), ("bad", 40)):
            (tmp_path / name / "a").mkdir(parents=True, exist_ok=True)
            noisy = np.clip(clip + rng.normal(0, 1, clip.shape) * noise, 0, 255).astype(np.uint8)
            write_mp4(tmp_path / name / "a" / f"{n}.mp4", noisy, 8.0)
    return tmp_path


def give(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["evaluate", *arguments])
    return evaluate.main()


def test_a_folder_is_judged_beside_its_reference(
    folders: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("good", "bad"):
        arguments = (f"videos={folders / name}", f"reference={folders / 'real'}", "metrics=[psnr,flicker,random]")
        assert give(monkeypatch, *arguments, f"out={folders / name}.json") == 0
    good, bad = (json.loads((folders / f"{name}.json").read_text()) for name in ("good", "bad"))
    psnr = [one["figures"]["psnr_db"]["columns"]["samples"] for one in (good, bad)]
    assert psnr[0]["low"] > psnr[1]["high"] + 5 and psnr[0]["n"] == good["videos"] == 10
    assert "real videos" not in good["figures"]["psnr_db"]["columns"], "a clip isn't compared with itself"
    assert good["figures"]["flicker"]["columns"]["real videos"]["value"] < 3
    assert bad["distances"]["random_kernel"]["samples"]["floor"]["n"] == 5
    text = (folders / "bad.html").read_text()
    assert text.count("<video") >= 9 and "psnr_db: worst" in text and "://" not in text
    capsys.readouterr()
    print_differences([str(folders / "bad.json"), str(folders / "good.json")], "all")
    printed = capsys.readouterr().out
    assert "better" in printed and "psnr db" in printed and "random kernel" in printed


def test_differences_are_paired_and_only_of_what_is_alike(folders: Path) -> None:
    judges = choose(["psnr", "flicker", "motion"], {})
    first, second = (
        json.loads(json.dumps(judge_folder(judges, str(folders / n), str(folders / "real"), None).as_json()))
        for n in ("bad", "good")
    )
    found = {d.name: d for d in differences(first, second, [])}
    assert found["psnr_db"].verdict == found["flicker"].verdict == "better" and found["psnr_db"].difference.n == 10
    assert found["motion"].verdict in ("differs", "can't tell"), "neither is better"
    assert differences(second, first, ["psnr_db"])[0].verdict == "worse"
    assert differences(first, first, ["psnr_db"])[0].verdict == "can't tell"
    with pytest.raises(InputError, match="differ in reference"):
        differences(first, {**second, "reference": "x"}, [])
    with pytest.raises(InputError, match="did you mean 'psnr_db'"):
        differences(first, second, ["psnr"])
    second["columns"]["samples"].pop()
    with pytest.raises(InputError, match="of 10 and 9 clips"):
        differences(first, second, [])
    with pytest.raises(InputError, match="has no evaluation"):
        read_evaluation(str(folders))


def test_names_must_go_together(folders: Path, tmp_path: Path) -> None:
    judges = choose(["flicker"], {})
    (folders / "good" / "extra.mp4").write_bytes((folders / "good/a/0.mp4").read_bytes())
    with pytest.raises(InputError, match="has nothing for 1 of 11 videos, the first is extra"):
        judge_folder(judges, str(folders / "good"), str(folders / "real"), None)
    (folders / "real" / "a" / "0.mp4").write_bytes(b"no video")
    with pytest.raises(InputError, match="0.mp4: no video can be read"):
        judge_folder(judges, str(folders / "real"), None, None)
    with pytest.raises(InputError, match="holds no videos"):
        (tmp_path / "none").mkdir()
        videos_in(str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.jsonl", '{"video": "a/0.mp4", "prompt": "a \\"red\\" ring", "kind": 1}\n{"name": "b", "caption": "two"}\n'),
        ("p.json", '{"a/0": "a \\"red\\" ring", "b": "two"}'),
        ("p.csv", 'video,prompt\na/0.mp4,"a ""red"" ring"\nb,two\n'),
        ("p.txt", 'a/0.mp4\ta "red" ring\nb\ttwo\n'),
    ],
)
def test_prompt_files(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    found = read_prompts(str(tmp_path / name))
    assert {key: row["caption"] for key, row in found.items()} == {"a/0": 'a "red" ring', "b": "two"}


@pytest.mark.parametrize("name", ["p.jsonl", "p.csv", "p.txt"])
def test_prompts_with_unusual_line_marks_are_whole(tmp_path: Path, name: str) -> None:
    prompt = "a ring\u2028and\x85a\x0bcup"
    rows = {
        "p.jsonl": json.dumps({"video": "a", "prompt": prompt}, ensure_ascii=False),
        "p.csv": f'video,prompt\na,"{prompt}"', "p.txt": f"a\t{prompt}",
    }  # fmt: skip
    (tmp_path / name).write_text(rows[name] + "\n", encoding="utf-8")
    assert read_prompts(str(tmp_path / name))["a"]["caption"] == prompt


def test_what_other_systems_put_beside_videos_is_passed_over(tmp_path: Path) -> None:
    for name in ("Cafe\u0301.mp4", "._Cafe\u0301.mp4", ".thumbnails/a.mp4", "__MACOSX.mp4/readme.txt"):
        path = tmp_path / "made" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    (tmp_path / "p.txt").write_text("Caf\u00e9.mp4\ta cup\n", encoding="utf-8")
    assert list(videos_in(str(tmp_path / "made"))) == list(read_prompts(str(tmp_path / "p.txt"))) == ["Caf\u00e9"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"video": "a"}', "entry 1 needs"), ("[1]", "an object for each"), ("{", "Expecting"),
        ('{"video": "a", "prompt": "x"}\n{"video": "a.mp4", "prompt": "y"}', "twice"), ("", "holds no prompts"),
    ],
)  # fmt: skip
def test_wrong_prompt_files_are_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(InputError, match=message):
        read_prompts(str(tmp_path / "p.jsonl"))


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, folders: Path) -> None:
    (folders / "file").write_text("no folder")
    for arguments, message in (
        ((), "run_dir=RUN, or videos=DIR"),
        ((f"videos={folders / 'good'}",), "must end in .json"),
        ((f"videos={folders / 'good'}", "out=x.json", "metrics=text_alignment"), "models={clip: FOLDER}"),
        ((f"videos={folders / 'good'}", "out=x.json", "metrics=[flicker,psnr]"), "real one: give reference=DIR"),
        ((f"videos={folders / 'good'}", "out=x.json", "metrics=random"), "distance from real videos: give reference="),
        ((f"videos={folders / 'good'}", f"out={folders / 'file' / 'x.json'}", "metrics=flicker"), "can't be used"),
        ((f"binding={folders / 'file'}",), "can't be used.* choose another binding"),
        (("votes=[a.json]",), "key=PAGE.key.json"),
        (("memorised=[a.tar]",), "name the samples"),
        ((f"videos={folders / 'good'}", "format=vbnech", "prompts=x"), "did you mean 'vbench'"),
    ):
        with pytest.raises(InputError, match=message):
            give(monkeypatch, *arguments)
