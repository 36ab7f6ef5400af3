"""Names, counts and lengths of others' benchmarks, and what a checker finds wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from sora_train.core.cli import InputError
from sora_train.core.media import write_mp4
from sora_train.evaluation.layouts import case_collisions, check_layout, wanted


def test_vbench(tmp_path: Path) -> None:
    (tmp_path / "all_dimension.txt").write_text("A fantasy landscape\na fantasy landscape\n\nA dog, running.\n")
    every = wanted("vbench", str(tmp_path / "all_dimension.txt"))
    assert len(every) == 15 and every[4].file == "A fantasy landscape-4.mp4" and every[14].prompt == "A dog, running."
    assert len(case_collisions(every)) == 10
    info = [
        {"prompt_en": "a lake, still", "dimension": ["temporal_flickering"]},
        {"prompt_en": "a dog", "dimension": ["overall_consistency", "subject_consistency"]},
    ]
    (tmp_path / "VBench_full_info.json").write_text(json.dumps(info))
    every = wanted("vbench", str(tmp_path / "VBench_full_info.json"))
    assert [w.file for w in every][24:26] == ["a lake, still-24.mp4", "a dog-0.mp4"] and len(every) == 30
    assert wanted("vbench_long", str(tmp_path / "VBench_full_info.json")) == every


def test_vbench2(tmp_path: Path) -> None:
    (tmp_path / "prompt").mkdir()
    long = "x" * 200
    (tmp_path / "prompt" / "Camera_Motion.txt").write_text("Garden, zoom in.\n")
    (tmp_path / "prompt" / "Diversity.txt").write_text(f"{long}\n")
    every = wanted("vbench2", str(tmp_path / "prompt"))
    assert len(every) == 23 and every[0].file == "Camera_Motion/Garden, zoom in.-0.mp4"
    assert every[-1].file == f"Diversity/{'x' * 180}-19.mp4" and every[-1].prompt == long
    (tmp_path / "clash").mkdir()
    (tmp_path / "clash" / "Material.txt").write_text(f"{long}\n{long}y\n")
    with pytest.raises(InputError, match="two prompts want the file"):
        wanted("vbench2", str(tmp_path / "clash"))


@pytest.fixture
def physics(tmp_path: Path) -> Path:
    rows = ["scenario,description,category,generated_video_name"]
    for n in range(1, 199):
        for take in (1, 2):
            rows.append(f'{n:04d}_left_take-{take}_fall.mp4,"A ball, falling.",Solid Mechanics,{n:04d}_left_fall.mp4')
    (tmp_path / "descriptions.csv").write_text("\n".join(rows) + "\n")
    return tmp_path


def test_physics_iq(physics: Path) -> None:
    every = wanted("physics_iq", str(physics / "descriptions.csv"))
    assert len(every) == 198 and every[0].file == "0001_left_fall.mp4" and every[0].prompt == "A ball, falling."
    out = physics / "out"
    out.mkdir()
    for name, frames, fps in (("0001", 40, 8), ("0002", 39, 8), ("0003", 80, 16)):
        write_mp4(out / f"{name}_left_fall.mp4", np.zeros((frames, 32, 32, 3), np.uint8), fps)
    (out / "0004_left_fall.mp4").write_bytes(b"no video")
    write_mp4(out / "stray.mp4", np.zeros((2, 32, 32, 3), np.uint8), 8)
    wrong = check_layout("physics_iq", str(out), every)
    assert len([line for line in wrong if line.startswith("missing")]) == 194
    assert "not asked for: stray.mp4" in wrong and "4.875 s instead of 5.000: 0002_left_fall.mp4" in wrong
    assert "frame rates differ: 8, 16" in wrong and any(line.startswith("can't be read: 0004") for line in wrong)
    assert not [line for line in wrong if "0001" in line]


def test_a_whole_folder_has_nothing_wrong(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a dog\n")
    every = wanted("vbench_long", str(tmp_path / "p.txt"))
    (tmp_path / "out").mkdir()
    for one in every:
        write_mp4(tmp_path / "out" / one.file, np.zeros((40, 16, 16, 3), np.uint8), 8)
    assert check_layout("vbench_long", str(tmp_path / "out"), every) == []
    write_mp4(tmp_path / "out" / every[0].file, np.zeros((16, 16, 16, 3), np.uint8), 8)
    assert check_layout("vbench_long", str(tmp_path / "out"), every) == [
        "2.000 s, VBench-Long is for 5 s and more: a dog-0.mp4"
    ]
    assert check_layout("vbench", str(tmp_path / "out"), every) == []


@pytest.mark.parametrize(
    ("form", "name", "text", "message"),
    [
        ("vbnech", "p.txt", "a", "did you mean 'vbench'"),
        ("vbench", "p.txt", "", "hold no prompt"),
        ("vbench", "p.txt", "a/b", "no file can be named"),
        ("vbench", "p.txt", "x" * 300, "no file can be named"),
        ("vbench", "p.json", '[{"x": 1}]', "are not those of vbench"),
        ("physics_iq", "p.csv", "a,b\n1,2\n", "are not those of physics_iq"),
    ],
)
def test_wrong_prompts_are_one_line(tmp_path: Path, form: str, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        wanted(form, str(tmp_path / name))
    with pytest.raises(InputError, match="there is no"):
        wanted("vbench", str(tmp_path / "none.txt"))
