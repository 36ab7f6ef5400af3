"""The command `sample` with a release folder: guarded, marked and signed by default, and one switch off."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sora_train.core.cli import InputError
from sora_train.core.media import read_mp4, write_mp4
from sora_train.release.folder import ReleaseFolder
from sora_train.release.verify import verify

Give = Callable[..., None]


@pytest.fixture
def released(made_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ReleaseFolder:
    """The release folder of this user."""
    import shutil

    shutil.copytree(made_folder, tmp_path / "release")
    monkeypatch.setenv("SORA_TRAIN_RELEASE", str(tmp_path / "release"))
    return ReleaseFolder(tmp_path / "release")


def test_it_signs_and_marks_by_default(sample: Give, released: ReleaseFolder) -> None:
    sample("prompt=a block", "height=64", "width=64", "out=clip.mp4")
    found = verify(Path("clip.mp4"), released, None)
    about = json.loads(Path("clip.json").read_text())
    assert found.manifest_holds and about["release"]["signed"] and about["release"]["guarded"]
    assert "release" not in about["options"] and "release.sign" not in about["options"]
    assert found.manifest is not None and found.manifest.claims["model"] == about["weights"]
    assert found.manifest.claims["mark"]["id"] == about["release"]["mark"]


def test_the_same_sample_has_the_same_mark_and_frames(sample: Give, released: ReleaseFolder) -> None:
    sample("prompt=a block", "height=64", "width=64", "out=clip.mp4")
    first = json.loads(Path("clip.json").read_text())["release"]["mark"]
    frames, _ = read_mp4("clip.mp4")
    sample("from=clip.json")
    assert json.loads(Path("clip.json").read_text())["release"]["mark"] == first
    assert np.array_equal(read_mp4("clip.mp4")[0], frames)


def test_switches(sample: Give, released: ReleaseFolder) -> None:
    sample("prompt=a block", "out=plain.mp4", "release=off")
    assert verify(Path("plain.mp4"), released, None).manifest is None
    assert "release" not in json.loads(Path("plain.json").read_text())
    sample("prompt=a block", "out=a.webm", "release.sign=false", "release.mark=false")
    (released.path / "words.txt").write_text("tea: teapot\n")
    sample("prompt=a teapot", "out=b.mp4", "release.guard=false")
    with pytest.raises(InputError, match="can't hold a signed manifest"):
        sample("prompt=a block", "out=c.webm")


def test_refused_prompts_are_named_and_the_others_are_made(
    sample: Give,
    released: ReleaseFolder,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (released.path / "words.txt").write_text("tea: teapot\n")
    Path("prompts.txt").write_text("a block\na t3apot\na ring\n")
    with pytest.raises(InputError, match="1 of 3 refused"):
        sample("prompts=prompts.txt", "out=many")
    assert sorted(path.name for path in Path("many").glob("*.mp4")) == ["0000.mp4", "0002.mp4"]
    assert "refused (tea, by words)" in capsys.readouterr().err


def test_long_and_given_videos_are_signed_too(sample: Give, released: ReleaseFolder) -> None:
    write_mp4("before.mp4", np.random.default_rng(0).integers(0, 255, (12, 64, 64, 3), dtype=np.uint8), 4.0)
    sample("prompt=a block", "seconds=5", "overlap=1", "video=before.mp4", "out=long.mp4", "height=64", "width=64")
    found = verify(Path("long.mp4"), released, None)
    assert found.manifest_holds and found.manifest is not None and found.manifest.ingredients == ["before.mp4"]


def test_evaluation_signs_its_samples(
    made: Path,
    sample: Give,
    released: ReleaseFolder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from sora_train import evaluate

    Path("prompts.jsonl").write_text('{"video": "a", "prompt": "a block"}\n')
    arguments = ["evaluate", "run_dir=run", "prompts=prompts.jsonl", "count=1", "metrics=flicker"]
    monkeypatch.setattr(sys, "argv", arguments)
    assert evaluate.main() == 0
    found = verify(next(Path("run/samples/prompts").glob("*.mp4")), released, None)
    assert found.manifest_holds and found.manifest is not None and "mark" not in found.manifest.claims
