"""Licences, forbidden material and takedown: nothing passes silently, and what goes leaves nothing behind."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset as wds

from data_tools import takedown
from data_tools.curation.forbidden import list_parameters
from data_tools.curation.hashes import hashes_of
from data_tools.curation.licences import read_licences
from data_tools.curation.stage import Drop
from sora_train.core.cli import InputError
from tests.data_tools.curation import films
from tests.data_tools.curation.conftest import LICENCES
from tests.data_tools.curation.outputs import lines, samples


def test_licences_say_what_may_be_used(tmp_path: Path) -> None:
    (tmp_path / "licences.toml").write_text(
        LICENCES + '[[source]]\nid = "old"\nmatch = "*"\nlicence = "unknown"\n'
        '[[source]]\nid = "last"\nmatch = "*"\nlicence = "CC0-1.0"\n'
    )
    found = read_licences(tmp_path, None, None)
    assert found.of("own/deep/a.mp4").id == "ours" and not found.of("bought/a.mp4").commercial
    with pytest.raises(Drop, match="no licence: source old has none"):
        found.of("elsewhere.mp4")
    assert read_licences(tmp_path / "own", None, "CC0-1.0").of("any.mp4").licence == "CC0-1.0"


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        ("*/A walk [dQw4w9WgXcQ].mp4", "own/A walk [dQw4w9WgXcQ].mp4"),
        ("Caf\u00e9/*", "Cafe\u0301/a.mp4"),
        ("[a].mp4", "[a].mp4"),
    ],
)
def test_names_with_brackets_and_accents_are_matched_as_they_are_shown(pattern: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "licences.toml").write_text(
        f'allowed = ["CC0-1.0"]\n[[source]]\nid = "x"\nmatch = "{pattern}"\nlicence = "CC0-1.0"\n', encoding="utf-8"
    )
    found = read_licences(tmp_path, None, None)
    assert found.of(name).id == "x"
    with pytest.raises(Drop, match="no source"):
        found.of("a.mp4")


@pytest.mark.parametrize("unknown", ["NOASSERTION", " none ", "N/A"])
def test_a_word_for_no_licence_allows_nothing(unknown: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is none; give the licence"):
        read_licences(tmp_path, None, unknown)
    (tmp_path / "licences.toml").write_text(
        f'allowed = ["{unknown}"]\n[[source]]\nid = "x"\nmatch = "*"\nlicence = "{unknown}"\n'
    )
    with pytest.raises(Drop, match="source x has none"):
        read_licences(tmp_path, None, None).of("a.mp4")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ('licence = "CC-BY-NC-4.0"', "licence not allowed"), ("opt_out = true", "opted out"),
        ('consent = "no"', "no consent"),
    ],
)  # fmt: skip
def test_a_source_that_may_not_be_used_is_dropped(change: str, reason: str, tmp_path: Path) -> None:
    entry = {"id": '"x"', "match": '"*"', "licence": '"CC0-1.0"'}
    name, _, value = change.partition(" = ")
    text = "\n".join(f"{key} = {one}" for key, one in (entry | {name: value}).items())
    (tmp_path / "licences.toml").write_text(f'allowed = ["CC0-1.0"]\n[[source]]\n{text}\n')
    with pytest.raises(Drop, match=reason):
        read_licences(tmp_path, None, None).of("a.mp4")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", 'must have allowed = \\["..."\\]'),
        ("allowed = [", "can't be read"),
        ('allowed = []\n[[source]]\nid = "x"\n', "must have id, match and licence"),
        ('allowed = []\n[[source]]\nid = "x"\nmatch = "*"\nlicence = "a"\nlicense = "b"\n', "did you mean 'licence'"),
        ('allowed = []\n[[source]]\nid = "x"\nmatch = 3\nlicence = "a"\n', "match must be a path"),
        ('allowed = []\n[[source]]\nid = "x"\nmatch = "*"\nlicence = "a"\nopt_out = "no"\n', "opt_out must be true or"),
    ],
)
def test_a_file_of_licences_that_says_nothing_is_an_error(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "licences.toml").write_text(text)
    with pytest.raises(InputError, match=said):
        read_licences(tmp_path, None, None)
    with pytest.raises(InputError, match="licence=CC0 is for all films"):
        read_licences(tmp_path, None, "CC0")


def test_files_of_other_encodings_are_read_or_named(tmp_path: Path) -> None:
    (tmp_path / "licences.toml").write_text(LICENCES, encoding="utf-8-sig")
    assert read_licences(tmp_path, None, None).of("own/a.mp4").id == "ours"
    listed = tmp_path / "list.txt"
    listed.write_text("0" * 64 + "  a file.mp4\n", encoding="utf-8-sig")
    assert list_parameters(str(listed))["path"] == str(listed)
    listed.write_text("0" * 64 + "\n", encoding="utf-16")
    with pytest.raises(InputError, match="is no text in UTF-8"):
        list_parameters(str(listed))


def test_films_without_any_licence_are_refused_at_once(tmp_path: Path, curated: Callable[..., int]) -> None:
    films.write(tmp_path / "raw/a.mp4", films.shot(1, 30))
    with pytest.raises(
        InputError, match=r"no film of \S+ has a licence: write \S+licences.toml .* or give licence=NAME"
    ):
        curated(tmp_path / "raw", tmp_path / "out")


def test_a_hit_of_the_forbidden_list_leaves_only_its_name(tmp_path: Path, curated: Callable[..., int]) -> None:
    raw, out = tmp_path / "raw", tmp_path / "out"
    planted = films.shot(40, 60)
    by_picture = films.write(
        raw / "by_picture.mp4", films.joined([films.shot(41, 30), planted[:, :, ::-1]]).frames_THWC
    )
    by_file = films.write(raw / "by_file.mp4", films.shot(42, 30))
    films.write(raw / "good.mp4", films.shot(43, 30))
    gray = cv2.resize(cv2.cvtColor(planted[30], cv2.COLOR_RGB2GRAY), (228, 128), interpolation=cv2.INTER_AREA)
    md5 = hashlib.md5(by_file.read_bytes(), usedforsecurity=False).hexdigest()
    (tmp_path / "list.txt").write_text(f"# a list\n{md5} case 7\n{hashes_of(gray)[0]:016x}\n")
    assert curated(raw, out, f"forbidden={tmp_path / 'list.txt'}", "licence=CC0-1.0") == 0
    dropped = {e["film"]: (e["stage"], e["reason"]) for e in lines(out / "dropped.jsonl")}
    assert dropped == {"by_file.mp4": ("probe", "forbidden"), "by_picture.mp4": ("look", "forbidden")}
    assert [path.name for path in (out / "work/look").iterdir()] == [
        f"{hashlib.sha256((raw / 'good.mp4').read_bytes()).hexdigest()[:32]}.npz"
    ]
    assert (out / "report.html").read_text().count("data:image") == 1 and len(samples(out)) == 1
    (tmp_path / "list.txt").write_text("nonsense\n")
    with pytest.raises(InputError, match="line 1 is no MD5"):
        curated(raw, tmp_path / "again", f"forbidden={tmp_path / 'list.txt'}", "licence=CC0-1.0")
    assert by_picture.is_file()


def run_takedown(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["takedown", *arguments])
    return takedown.main()


def test_a_takedown_leaves_nothing_and_names_the_checkpoints(
    out: Path, footage: Path, tmp_path: Path, curated: Callable[..., int], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run, original = tmp_path / "run", out
    out = tmp_path / "out"
    shutil.copytree(original, out)
    before = samples(out)
    gone = next(s for s in before if s["json"]["source"] == "theirs")
    place = [s["__key__"] for s in before].index(gone["__key__"])
    (run / "ledger").mkdir(parents=True)
    (run / "config.yaml").write_text(json.dumps({"data": {"sources": {"mine": {"shards": [f"{out}/*.tar"]}}}}))
    steps = [{"step": n, "samples": [place] if n == 3 else [(place + 1) % len(before)]} for n in range(1, 6)]
    (run / "ledger/rank-0.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    for step in (2, 4, 5):
        (run / f"checkpoints/step-{step:08d}").mkdir(parents=True)
    latents = tmp_path / "latents.tar"
    with wds.TarWriter(str(latents)) as tar:
        for key in (gone["__key__"], f"{gone['__key__']}+1", "another+1"):
            tar.write({"__key__": key, "bin": b"latents"})

    with pytest.raises(InputError, match="its sources: ours, theirs"):
        run_takedown(monkeypatch, "nobody", f"out={out}")
    assert run_takedown(monkeypatch, "theirs", f"out={out}", f"runs=[{run}]", f"shards=[{latents}]") == 0
    said = capsys.readouterr().out
    assert "1 film(s) of theirs taken down, 1 samples removed" in said and "2 samples removed" in said
    assert [line for line in said.splitlines() if line.startswith("trained on it")] == [
        f"trained on it: {run}/checkpoints/step-{step:08d}" for step in (4, 5)
    ]
    assert [s["__key__"] for s in samples(out)] == [s["__key__"] for s in before if s is not gone]
    key, media, sha256 = gone["__key__"].encode(), gone["mp4"], gone["json"]["film_sha256"]
    for path in (path for path in out.rglob("*") if path.is_file() and path.name != "takedowns.jsonl"):
        data = path.read_bytes()
        assert key not in data and media[100:400] not in data and sha256.encode() not in data, path
        assert sha256[:32] not in path.name
    assert key.decode() not in pq.read_table(out / "scores.parquet")["key"].to_pylist()
    assert [s["__key__"] for s in wds.WebDataset(str(latents), shardshuffle=False)] == ["another+1"]

    assert curated(footage, out) == 0  # it doesn't come back
    assert all(s["json"]["source"] == "ours" for s in samples(out))
    assert {e["film"] for e in lines(out / "dropped.jsonl") if e["reason"] == "taken down"} == {
        "bought/again.mp4", "bought/cut.mp4", "bought/page.mp4",
    }  # fmt: skip
    assert run_takedown(monkeypatch, "theirs", f"out={out}") == 0
    assert "trained on it" in capsys.readouterr().out  # what was found once stays known
    assert np.isfinite(pq.read_table(out / "scores.parquet")["motion"].to_numpy()).all()
