"""A part of a video holds the frames of its seconds and no others, whatever they are stored in; else it is refused."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import av
import numpy as np
import pytest
import webdataset as wds

from data_tools import build_shards
from data_tools.captions import read_table
from data_tools.columns import Columns
from data_tools.cut import Part, cut, cut_file
from sora_train.core.cli import InputError
from sora_train.data.index.index import load_index
from sora_train.data.index.make import index_shards

FRAMES, RATE, SIDE = 40, 10, 8
KINDS = {
    "mp4": ("mp4", "libx264", {"g": "12", "bf": "2"}),
    "one_key.mp4": ("mp4", "libx264", {"g": "99", "bf": "3"}),
    "refresh.mp4": ("mp4", "libx264", {"g": "99", "bf": "0", "x264-params": "intra-refresh=1"}),
    "open.mkv": ("matroska", "libx264", {"g": "10", "bf": "3", "x264-params": "open-gop=1"}),
    "ts": ("mpegts", "libx264", {"g": "12", "bf": "2"}),
    "webm": ("webm", "libvpx-vp9", {"g": "12"}),
    "mov": ("mov", "mjpeg", {}),
}


def numbered(container: str, codec: str, options: dict[str, str]) -> bytes:
    """A video of which every frame shows its number as black and white squares."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as file:
        stream = file.add_stream(codec, rate=RATE, options=options)
        stream.width, stream.height = 6 * SIDE, 32
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for number in range(FRAMES):
            picture = np.zeros((32, 6 * SIDE, 3), np.uint8)
            for bit in range(6):
                picture[:, bit * SIDE : (bit + 1) * SIDE] = 255 * (number >> bit & 1)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(stream.encode(None))
    return buffer.getvalue()


def numbers(data: bytes) -> list[int]:
    """The numbers that the frames of a video show."""
    with av.open(io.BytesIO(data)) as file:
        pictures = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
    at = [bit * SIDE + SIDE // 2 for bit in range(6)]
    return [sum(int(picture[16, x].mean() > 127) << bit for bit, x in enumerate(at)) for picture in pictures]


@pytest.mark.parametrize("name", KINDS)
def test_a_part_shows_the_frames_of_its_seconds(tmp_path: Path, name: str) -> None:
    path = tmp_path / f"x.{name}"
    path.write_bytes(numbered(*KINDS[name]))
    assert numbers(path.read_bytes()) == list(range(FRAMES))
    seconds = [(0.0, 0.5), (0.5, 1.0), (1.3, 2.25), (0.95, 1.85), (3.0, math.inf), (2.0, 2.1)]
    frames = [(0, 5), (13, 23), (30, math.inf), (7, 8)]
    parts = [*(Part(*ends) for ends in seconds), *(Part(*ends, of_frames=True) for ends in frames)]
    assert cut(path, parts, tmp_path) == [""] * len(parts)
    for number, (start, end, of_frames) in enumerate(parts):
        at = range(FRAMES) if of_frames else [n / RATE + 1e-4 for n in range(FRAMES)]
        wanted = [n for n in range(FRAMES) if start <= at[n] < end]
        found = numbers((tmp_path / f"{number}.mp4").read_bytes())
        assert found == wanted[: len(found)] and len(found) >= max(1, len(wanted) - 3), (start, end)


def test_what_cannot_be_cut_is_said(tmp_path: Path) -> None:
    path = tmp_path / "x.mp4"
    path.write_bytes(numbered(*KINDS["mp4"]))
    said = ["no frame from 9 to 10 s; the last one is at 3.9", "no frame from 40 to 50 frames; the last one is at 39"]
    assert cut(path, [Part(9.0, 10.0), Part(40, 50, of_frames=True)], tmp_path) == said
    (tmp_path / "vp8.webm").write_bytes(numbered("webm", "libvpx", {"g": "12"}))
    assert "vp8 can't be in mp4" in cut(tmp_path / "vp8.webm", [Part(0.0, 1.0)], tmp_path)[0]
    (tmp_path / "text.mp4").write_bytes(b"#EXTM3U\nhttp://example.com/x.ts\n")
    assert cut_file(tmp_path / "text.mp4", [Part(0.0, 1.0), Part(1.0, 2.0)], tmp_path) == ["not a video"] * 2


def test_rows_with_start_and_end_become_clips_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.mp4").write_bytes(numbered(*KINDS["mp4"]))
    table = tmp_path / "t.csv"
    rows = "a.mp4,first,0,1.2,1\na.mp4,last,0:03.0,,2\na.mp4,nowhere,8,9,3\n"
    table.write_text("file,caption,start,end,score\n" + rows)

    def build(*more: str) -> None:
        argv = [
            "build_shards",
            f"videos={tmp_path / 'in'}",
            f"out={tmp_path / 'out'}",
            f"captions={table}",
            "workers=1",
        ]
        monkeypatch.setattr("sys.argv", [*argv, *more])
        assert build_shards.main() == 0

    build()
    shards = [str(path) for path in (tmp_path / "out").glob("*.tar")]
    samples = {json.loads(s["json"])["caption"]: s for s in wds.WebDataset(shards, shardshuffle=False)}
    assert {caption: numbers(s["mp4"]) for caption, s in samples.items()} == {
        "first": list(range(12)), "last": list(range(30, 40)),
    }  # fmt: skip
    assert [s["__key__"].rpartition("-")[0] for s in samples.values()] == ["a_0-1_2", "a_3-inf"]
    index_shards(shards, workers=1)
    assert load_index(shards).frames.tolist() == [12, 10]
    refused = [json.loads(line) for line in (tmp_path / "out/refused.jsonl").read_text().splitlines()]
    assert [(r["file"], r["reason"]) for r in refused] == [("a.mp4#8-9", "part")]
    assert not list((tmp_path / "out").glob(".cut-*"))
    table.write_text(table.read_text().replace("first", "another"))
    with pytest.raises(InputError, match="1 samples changed since they were built .1 captions; such as a.mp4#0-1.2"):
        build()
    build("update=true")
    samples = {json.loads(s["json"])["caption"] for s in wds.WebDataset(shards, shardshuffle=False)}
    assert samples == {"another", "last"}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.csv", "file,caption,start_frame,end_frame\na.mp4,first,0,12\na.mp4,last,30,\n"),
        ("t.json", '[{"path": "a.mp4", "cap": "first", "cut": [0, 12]},'
                   '{"path": "a.mp4", "cap": "last", "cut": [30, 40]}]'),
        ("t.jsonl", '{"path": "a.mp4", "cap": "first", "frame_idx": "0:12"}\n'
                    '{"path": "a.mp4", "cap": "last", "frame_idx": "30:99"}'),
    ],
)  # fmt: skip
def test_rows_with_frames_become_clips_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.mp4").write_bytes(numbered(*KINDS["mp4"]))
    (tmp_path / name).write_text(text)
    argv = ["build_shards", f"videos={tmp_path / 'in'}", f"out={tmp_path / 'out'}", f"captions={tmp_path / name}"]
    monkeypatch.setattr("sys.argv", [*argv, "workers=1"])
    assert build_shards.main() == 0
    shards = [str(path) for path in (tmp_path / "out").glob("*.tar")]
    samples = list(wds.WebDataset(shards, shardshuffle=False))
    assert {s["txt"]: numbers(s["mp4"]) for s in samples} == {
        b"first": list(range(12)), b"last": list(range(30, 40)),
    }  # fmt: skip
    assert samples[0]["__key__"].startswith("a_0-12f-")


def test_what_is_no_range_of_frames_refuses_its_row(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text(
        "file,caption,start_frame,end_frame,cut\na.mp4,x,1.5,9,\na.mp4,y,9,9,\na.mp4,z,,,yes\na.mp4,w,,,\n"
    )
    rows = read_table(table, Columns()).rows
    assert [str(row.captions) for row in rows[:2]] == [
        "bad caption row: row 2: '1.5' is no number of a frame",
        "bad caption row: row 3: it goes from 9 to 9 frames",
    ]
    assert [(row.part, row.fields["cut"]) for row in rows[2:]] == [(None, "yes"), (None, "")]
