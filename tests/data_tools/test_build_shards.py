"""A folder of media becomes shards: every refusal named, a kill loses nothing, the bytes are the user's own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds

from data_tools import build_shards, index
from sora_train.core.cli import InputError
from sora_train.core.media import encode_mp4, write_png
from sora_train.data.index.consolidated import consolidate, load_consolidated
from sora_train.data.index.index import load_index
from sora_train.data.index.make import index_shards

ROOT = Path(__file__).parents[2]


def clip(seed: int, frames: int = 5) -> bytes:
    """A real video of about 10 kB; another seed gives other bytes."""
    rng = np.random.default_rng(seed)
    return encode_mp4(rng.integers(0, 255, (frames, 32, 32, 3), dtype=np.uint8), 8)


def put(folder: Path, name: str, data: bytes, caption: str | bytes | None = "a caption") -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    if caption is not None:
        path.with_suffix(".txt").write_bytes(caption.encode() if isinstance(caption, str) else caption)


def build(monkeypatch: pytest.MonkeyPatch, folder: Path, out: Path, *more: str) -> int:
    monkeypatch.setattr("sys.argv", ["build_shards", f"videos={folder}", f"out={out}", "workers=2", *more])
    return build_shards.main()


def read(out: Path) -> list[dict[str, Any]]:
    shards = sorted(map(str, out.glob("*.tar")))
    return list(wds.WebDataset(shards, shardshuffle=False, empty_check=False))


def refusals(out: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in (out / "refused.jsonl").read_text().splitlines():
        entry = json.loads(line)
        found.setdefault(entry["file"], []).append(f"{entry['reason']}: {entry['detail']}")
    return found


def test_every_bad_file_is_refused_with_its_reason_and_the_rest_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    put(folder, "good.mp4", clip(0), "  a good one\n")
    put(folder, "deep/er/Ünï cödé.v2.MP4", clip(1), "deep ü")
    write_png(folder / "picture.png", np.zeros((8, 8, 3), np.uint8))
    (folder / "picture.txt").write_text("\ufeffa still")
    put(folder, "empty.mp4", b"")
    put(folder, "text.mp4", b"#EXTM3U\nhttp://example.com/x.ts\n")
    put(folder, "cut.mp4", clip(2)[:300])
    put(folder, "page.jpg", b"<html>not a picture</html>")
    put(folder, "silent.mp4", clip(3), None)
    put(folder, "blank.mp4", clip(4), " \n")
    put(folder, "latin.mp4", clip(5), "caf\xe9".encode("latin-1"))
    put(folder, "copy_of_good.mp4", clip(0), "the same video")
    (folder / "broken_link.mp4").symlink_to(folder / "nowhere.mp4")
    put(folder, ".hidden/x.mp4", clip(6))
    put(folder, "sound.m4a", b"sound")
    os.mkfifo(folder / "pipe.mp4")
    put(folder, "piped.mp4", clip(7), None)
    os.mkfifo(folder / "piped.txt")
    put(folder, "still.mp4", clip(8), "a video with a thumbnail")
    put(folder, "still.jpg", b"its thumbnail", None)
    (folder / "notes.md").write_text("no media")
    assert build(monkeypatch, folder, out) == 0

    samples = {s["txt"].decode(): s for s in read(out)}
    assert set(samples) == {"the same video", "deep ü", "a still", "a video with a thumbnail"}
    assert samples["the same video"]["mp4"] == clip(0)
    assert samples["a still"]["png"] == (folder / "picture.png").read_bytes()
    assert all(s["__key__"].replace("-", "").replace("_", "").isalnum() for s in samples.values())
    found = refusals(out)
    for file, reason in {
        "good.mp4": "duplicate: the same bytes as copy_of_good.mp4",
        "empty.mp4": "empty file: ",
        "text.mp4": "not a video: ",
        "cut.mp4": "undecodable: ",
        "page.jpg": "undecodable: ",
        "silent.mp4": "no caption: no row in captions= and no silent.txt",
        "blank.mp4": "empty caption: ",
        "latin.mp4": "caption not UTF-8: byte 0xe9 at position 3",
        "pipe.mp4": "unreadable: a pipe, socket or device",
        "piped.mp4": "unreadable: caption: piped.txt is not a file",
        "sound.m4a": "unknown kind: .m4a",
        "still.jpg": "thumbnail: beside still.mp4",
        "broken_link.mp4": "unreadable: ",
    }.items():
        assert len(found[file]) == 1 and found.pop(file)[0].startswith(reason)
    assert not found
    printed = capsys.readouterr().out
    assert printed.count("refused: ") == 13
    assert "4 samples added" in printed and "13 refused" in printed
    assert "passed over: 1 files of other kinds (m4a 1)" in printed


def test_csv_and_jsonl_tables_give_captions_and_metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "in"
    for number in range(5):
        put(folder, f"sub/{number}.mp4", clip(number), None)
    put(folder, "sub/5.mp4", clip(5), "from the sidecar")
    table = tmp_path / "table.csv"
    table.write_bytes(
        b'\xef\xbb\xbfFileName,Text,source\r\nsub/0.mp4,"a ""quoted"", caption\nof two lines",web\r\n'
        + f"{folder}/sub/1.mp4,absolute,web\r\n".encode()
        + b"2.mp4,bare name,tv\r\nsub/3.mp4,caf\xe9,tv\r\nsub/4.mp4,,tv\r\n"
        + b"sub/9.mp4,nobody,tv\r\n./sub/0.mp4,again,web\r\nsub/0.mp4,again,web\r\n"
    )
    assert build(monkeypatch, folder, tmp_path / "csv", f"captions={table}") == 0
    samples = read(tmp_path / "csv")
    fields = [json.loads(s["json"]) for s in samples if "json" in s]
    assert fields == [
        {"captions": {"0": 'a "quoted", caption\nof two lines', "1": "again"}, "source": "web"},
        {"caption": "absolute", "source": "web"},
        {"caption": "bare name", "source": "tv"},
    ]
    assert [s["txt"] for s in samples if "txt" in s] == [b"from the sidecar"]
    found = refusals(tmp_path / "csv")
    assert found["sub/3.mp4"] == ["caption not UTF-8: byte 0xe9 at position 3; encoding=... says what the table is"]
    assert found["sub/4.mp4"] == ["empty caption: "]
    assert found["sub/9.mp4"] == ["caption without file: row 7: there is no such file"]
    assert found["sub/0.mp4"] == ["duplicate: row 9: row 8 has the same caption for the same file"]

    lines = [
        {"path": "sub/0.mp4", "captions": {"short": "s", "long": "l"}, "score": 0.5, "tags": ["a"]},
        {"path": "sub/1.mp4", "caption": "plain"},
        {"path": "sub/2.mp4", "caption": 7},
    ]
    table = tmp_path / "table.jsonl"
    table.write_text("\n".join(map(json.dumps, lines)) + "\nnot json\n[1]\n")
    assert build(monkeypatch, folder, tmp_path / "jsonl", f"captions={table}") == 0
    first, second, third = read(tmp_path / "jsonl")
    assert json.loads(first["json"]) == {"captions": {"short": "s", "long": "l"}, "score": 0.5, "tags": ["a"]}
    assert (second["txt"], third["txt"]) == (b"plain", b"from the sidecar")
    found = refusals(tmp_path / "jsonl")
    assert found["sub/2.mp4"] == ["caption not text: the caption is a number, not text"]
    assert len(found["table.jsonl"]) == 2


def test_members_are_adjacent_media_first_and_dates_are_fixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        put(tmp_path / "in", f"{number}.jpeg" if number == 2 else f"{number}.mp4", clip(number))
    write_png(tmp_path / "p.png", np.zeros((4, 4, 3), np.uint8))
    (tmp_path / "in/2.jpeg").write_bytes((tmp_path / "p.png").read_bytes())
    build(monkeypatch, tmp_path / "in", tmp_path / "out")
    with tarfile.open(tmp_path / "out/shard-000000.tar") as tar:
        members = tar.getmembers()
    assert [m.name.split(".")[1] for m in members] == ["mp4", "txt", "mp4", "txt", "jpg", "txt"]
    assert {m.mtime for m in members} == {0}


def test_keys_are_unique_stable_and_safe() -> None:
    files = [
        "a/b.mp4",
        "a_b.mp4",
        "a/b.webm",
        "a.b.mp4",
        "../../x.mp4",
        "é.mp4",
        "e\u0301.mp4",
        "x" * 300 + ".mp4",
        "\udcff.mp4",
    ]
    keys = [build_shards.key_of(file) for file in files]
    assert len({key.lower() for key in keys}) == len(files)
    assert all(len(key) <= 75 and key.isascii() and not set(key) & set("./ ") for key in keys)
    assert keys[0] == "a_b-b0a066fc48"


def test_killed_and_run_again_gives_the_same_shards(python: str, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    for number in range(60):
        put(folder, f"{number:02d}.mp4", clip(number) if number % 7 else b"junk", f"caption {number}")
    base = [python, "-m", "data_tools.build_shards", f"videos={folder}", "shard_size=0.03", "workers=1"]
    killed = subprocess.Popen([*base, f"out={tmp_path / 'killed'}"], cwd=ROOT, stdout=subprocess.DEVNULL)
    whole = subprocess.Popen([*base, f"out={tmp_path / 'whole'}"], cwd=ROOT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 600
    while not (tmp_path / "killed/shard-000002.tar").exists():
        assert killed.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert whole.wait(600) == 0
    shards = sorted(p.name for p in (tmp_path / "whole").glob("*.tar"))
    assert len(list((tmp_path / "killed").glob("*.tar"))) < len(shards)
    with (tmp_path / "killed/build.jsonl").open("ab") as journal:
        journal.write(b'{"shard": "shard-0000')  # and half a line, as a kill may leave it
    again = subprocess.run([*base, f"out={tmp_path / 'killed'}"], cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert sorted(p.name for p in (tmp_path / "killed").iterdir()) == sorted(
        p.name for p in (tmp_path / "whole").iterdir()
    )
    for name in (*shards, "build.jsonl", "refused.jsonl"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_second_run_adds_only_what_is_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    for number in range(4):
        put(folder, f"{number}.mp4", clip(number), "c" if number else None)
    build(monkeypatch, folder, out)
    before = (out / "shard-000000.tar").read_bytes()
    capsys.readouterr()
    build(monkeypatch, folder, out)
    assert "nothing to add, 3 samples in 1 shards" in capsys.readouterr().out
    put(folder, "00.mp4", clip(10), "new")
    put(folder, "0.mp4", clip(0), "captioned at last")
    put(folder, "1_copy.mp4", clip(1), "a copy of one that is done")
    build(monkeypatch, folder, out)
    assert (out / "shard-000000.tar").read_bytes() == before
    assert [s["txt"] for s in read(out)][3:] == [b"captioned at last", b"new"]
    assert list(refusals(out)) == ["1_copy.mp4"]
    with pytest.raises(InputError, match="was built with"):
        build(monkeypatch, folder, out, "shard_size=1")
    (out / "shard-000001.tar").unlink()
    with pytest.raises(InputError, match="not there"):
        build(monkeypatch, folder, out)


def test_a_changed_caption_or_video_is_named_and_update_writes_its_shard_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    for number in range(4):
        put(folder, f"{number}.mp4", clip(number), f"caption {number}")
    build(monkeypatch, folder, out, "shard_size=0.004")
    shards = sorted(out.glob("*.tar"))
    assert len(shards) == 4
    before = [shard.read_bytes() for shard in shards]
    index_shards([str(shard) for shard in shards], workers=1)
    put(folder, "1.mp4", clip(1), "caption X")  # of the same length, and the video of the same bytes
    put(folder, "2.mp4", clip(12), "caption 2")
    (folder / "3.txt").unlink()
    with pytest.raises(InputError, match=r"3 samples changed .*1 captions.*: give update=true"):
        build(monkeypatch, folder, out, "shard_size=0.004")
    assert [shard.read_bytes() for shard in shards] == before
    put(folder, "5.mp4", clip(5), "caption 5")
    assert build(monkeypatch, folder, out, "shard_size=0.004", "update=true") == 0
    assert "1 samples added, 3 of changed files written anew, 4 samples" in capsys.readouterr().out
    assert shards[0].read_bytes() == before[0]
    samples = {s["txt"].decode(): s["mp4"] for s in read(out)}
    assert samples == {"caption 0": clip(0), "caption X": clip(1), "caption 2": clip(12), "caption 5": clip(5)}
    assert [shard.with_suffix(".index.parquet").exists() for shard in shards] == [True, False, False, False]
    assert build(monkeypatch, folder, out, "shard_size=0.004") == 0
    assert "nothing to add, 4 samples" in capsys.readouterr().out
    (folder / "0.mp4").unlink()  # the original may go
    assert build(monkeypatch, folder, out, "shard_size=0.004") == 0


def test_another_table_of_captions_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, out, table = tmp_path / "in", tmp_path / "out", tmp_path / "new.csv"
    put(folder, "0.mp4", clip(0), "old")
    build(monkeypatch, folder, out)
    table.write_text("file,caption\n0.mp4,new\n")
    with pytest.raises(InputError, match="1 samples changed since they were built .1 captions; such as 0.mp4"):
        build(monkeypatch, folder, out, f"captions={table}")
    build(monkeypatch, folder, out, f"captions={table}", "update=true")
    assert [s["txt"] for s in read(out)] == [b"new"]


def test_a_share_of_the_sources_is_held_out_and_stays_on_its_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    more = ("validation=0.25", "source=folder")
    for number in range(8):
        put(folder, f"film{number // 2}/{number}.mp4", clip(number), f"{number // 2}")
    build(monkeypatch, folder, out, *more)
    films = {side: {s["txt"] for s in read(out / side)} for side in ("", "validation")}
    assert len(films[""]) == 3 and len(films["validation"]) == 1 and not films[""] & films["validation"]
    assert len(read(out)) == 6 and len(read(out / "validation")) == 2
    assert f"data.validation=[{out}/validation/shard-*.tar]" in capsys.readouterr().out
    for number in range(8, 24):
        put(folder, f"film{number % 8}/{number}.mp4", clip(number), f"{number % 8}")
    build(monkeypatch, folder, out, *more)
    again = {side: {s["txt"] for s in read(out / side)} for side in ("", "validation")}
    assert films[""] <= again[""] and films["validation"] <= again["validation"]
    assert not again[""] & again["validation"] and len(again[""] | again["validation"]) == 8
    with pytest.raises(InputError, match="was built with"):
        build(monkeypatch, folder, out)
    with pytest.raises(InputError, match="source=genre is no column"):
        build(monkeypatch, folder, tmp_path / "other", "validation=0.25", "source=genre")


def test_samples_without_captions_are_for_an_autoencoder_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "in", "0.mp4", clip(0), None)
    put(tmp_path / "in", "1.mp4", clip(1), "which isn't asked for")
    build(monkeypatch, tmp_path / "in", tmp_path / "out", "captions=none")
    assert [set(s) & {"mp4", "txt", "json"} for s in read(tmp_path / "out")] == [{"mp4"}, {"mp4"}]
    shards = [str(tmp_path / "out/shard-000000.tar")]
    index_shards(shards, workers=1)
    with pytest.raises(InputError, match="no usable sample.*no_caption 2"):
        load_index(shards)
    found = load_index(shards, captioned=False)
    assert found.usable.all() and found.frames.tolist() == [5, 5]
    consolidate(shards, tmp_path / "whole")
    assert load_consolidated(tmp_path / "whole", shards, captioned=False).usable.all()
    with pytest.raises(InputError, match="holds no usable sample"):
        load_consolidated(tmp_path / "whole", shards)


def test_wrong_input_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    with pytest.raises(InputError, match="no video or image in"):
        build(monkeypatch, folder, out)
    put(folder, "bad.mp4", b"junk")
    (tmp_path / "no_columns.csv").write_text("bad.mp4,a caption\n")
    (tmp_path / "no_rows.csv").write_text("file,caption\n")
    (tmp_path / "table.xlsx").write_bytes(b"PK")
    for more, message in (
        ([f"captions={tmp_path / 'none.csv'}"], "is not a file"),
        ([f"captions={tmp_path / 'no_columns.csv'}"], "first line must name"),
        ([f"captions={tmp_path / 'no_rows.csv'}"], "has no row"),
        ([f"captions={tmp_path / 'table.xlsx'}"], "must be a .csv"),
        (["shard_size=0"], "above 0"),
        ([], "none of the 1 files"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            build(monkeypatch, folder, out, *more)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="is not there"):
        build(monkeypatch, tmp_path / "nowhere", out)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/a.tar").write_bytes(b"")
    with pytest.raises(InputError, match="no build.jsonl"):
        build(monkeypatch, folder, tmp_path / "foreign")


def test_index_tool_prints_a_line_for_each_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(4):
        put(tmp_path / "in", f"{number}.mp4", clip(number))
    build(monkeypatch, tmp_path / "in", tmp_path / "out", "shard_size=0.02")
    capsys.readouterr()
    monkeypatch.setattr("sys.argv", ["index", str(tmp_path / "out/*.tar")])
    assert index.main() == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if ".tar: " in line]
    assert len(lines) == len(list((tmp_path / "out").glob("*.tar"))) > 1
    assert all("0 refused" in line for line in lines)
    monkeypatch.setattr("sys.argv", ["index"])
    with pytest.raises(InputError, match="no shard given"):
        index.main()
