"""Every row of a caption table gives its whole caption to its own file, or is refused; nothing shifts or is guessed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_tools.candidates import Candidate, CaptionOptions, Refusals, find_candidates
from data_tools.columns import Columns
from data_tools.media_files import find_media
from sora_train.core.cli import InputError

DOG, CAT, BIRD = "a dog", "a cat", "a bird"
THREE = {"000.mp4": DOG, "001.mp4": CAT, "002.mp4": BIRD}


def folder_of(tmp_path: Path, *files: str) -> Path:
    """A folder of files that only look like videos: nothing here decodes them."""
    for number, file in enumerate(files or THREE):
        path = tmp_path / "videos" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"video %d" % number)
    return tmp_path / "videos"


def candidates(folder: Path, table: Path | None = None, **more: Any) -> tuple[list[Candidate], list[dict[str, str]]]:
    refusals = Refusals()
    more["columns"] = Columns.parse(more.get("columns"))
    found = find_candidates(folder, find_media(folder), CaptionOptions(str(table) if table else None, **more), refusals)
    return found, refusals.entries


def captions(folder: Path, table: Path | None = None, **more: Any) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """The caption (or captions) of each sample, and the reason and file of each refusal."""
    found, refused = candidates(folder, table, **more)
    texts = {c.name: c.fields.get("caption", c.fields.get("captions")) for c in found}
    return texts, [(entry["reason"], entry["file"]) for entry in refused]


def put(tmp_path: Path, name: str, content: str | bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


TABLES = {
    "commas.csv": "file,caption\n000.mp4,a dog\n001.mp4,a cat\n002.mp4,a bird\n",
    "carriage_returns.csv": "file,caption\r000.mp4,a dog\r001.mp4,a cat\r002.mp4,a bird\r",
    "utf16.csv": "file,caption\r\n000.mp4,a dog\r\n001.mp4,a cat\r\n002.mp4,a bird\r\n".encode("utf-16"),
    "utf16_unmarked.csv": "file,caption\n000.mp4,a dog\n001.mp4,a cat\n002.mp4,a bird\n".encode("utf-16-le"),
    "utf16_big.tsv": "file\tcaption\n000.mp4\ta dog\n001.mp4\ta cat\n002.mp4\ta bird\n".encode("utf-16-be"),
    "utf32.csv": "file,caption\n000.mp4,a dog\n001.mp4,a cat\n002.mp4,a bird\n".encode("utf-32"),
    "excel.csv": b"\xef\xbb\xbffile;caption;\r\n000.mp4;a dog;\r\n001.mp4;a cat;\r\n002.mp4;a bird;\r\n",
    "separator.csv": "sep=;\nfile;caption\n000.mp4;a dog\n001.mp4;a cat\n002.mp4;a bird\n",
    "pipes.csv": "file|caption\n000.mp4|a dog\n001.mp4|a cat\n002.mp4|a bird\n",
    "spaces.csv": 'file, caption\n000.mp4, "a dog"\n001.mp4, "a cat"\n002.mp4, a bird\n\n',
    "pandas.csv": ",file,caption\n0,000.mp4,a dog\n1,001.mp4,a cat\n2,002.mp4,a bird\n",
    "diffsynth.csv": "video,prompt\nvideos/000.mp4,a dog\nvideos/001.mp4,a cat\nvideos/002.mp4,a bird\n",
    "stems.csv": "video,text\n000,a dog\n001,a cat\n002,a bird\n",
    "case.csv": "file,caption\n000.MP4,a dog\n001.Mp4,a cat\n002.mp4,a bird\n",
    "other_machine.csv": "path,text\n/mnt/old/videos/000.mp4,a dog\n/mnt/old/videos/001.mp4,a cat\n/x/002.mp4,a bird\n",
    "windows.csv": "path,text\nC:\\data\\videos\\000.mp4,a dog\nvideos\\001.mp4,a cat\n002.mp4,a bird\n",
    "web.csv": "path,text\nhttps://example.com/v/000.mp4?x=1,a dog\nfile:///d/001.mp4,a cat\n./002.mp4,a bird\n",
    "musubi.jsonl": [{"video_path": f"videos/{f}", "caption": c} for f, c in THREE.items()],
    "videox_fun.json": [{"file_path": f"videos/{f}", "text": c, "type": "video"} for f, c in THREE.items()],
    "open_sora_plan.json": [{"path": f"videos/{f}", "cap": [c], "fps": 8.0} for f, c in THREE.items()],
    "by_file.json": THREE,
    "kohya.json": {f: {"caption": c, "tags": "x"} for f, c in THREE.items()},
    "one_list.json": {"version": 1, "videos": [{"file": f, "caption": c} for f, c in THREE.items()]},
    "pandas.json": {
        "file": dict(zip("012", THREE, strict=True)),
        "caption": dict(zip("012", THREE.values(), strict=True)),
    },
    "lines.json": "\n".join(json.dumps({"file": f, "caption": c}) for f, c in THREE.items()),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_as_programs_write_them_give_each_file_its_caption(tmp_path: Path, name: str) -> None:
    content = TABLES[name]
    if not isinstance(content, (str, bytes)):
        lines = name.endswith(".jsonl")
        content = "\n".join(map(json.dumps, content)) if lines else json.dumps(content)
    assert captions(folder_of(tmp_path), put(tmp_path, name, content)) == (THREE, [])


def test_a_parquet_table_gives_captions_and_fields_of_their_types(tmp_path: Path) -> None:
    table = {
        "video": [{"bytes": b"x", "path": file} for file in THREE], "text": list(THREE.values()),
        "score": [1.5, None, math.nan], "n": [1, 2, 3], "raw": [b"1", b"2", b"3"],
    }  # fmt: skip
    pq.write_table(pa.table(table), tmp_path / "t.parquet")
    found, refused = candidates(folder_of(tmp_path), tmp_path / "t.parquet")
    assert [c.fields for c in found] == [
        {"caption": DOG, "score": 1.5, "n": 1},
        {"caption": CAT, "score": None, "n": 2},
        {"caption": BIRD, "score": None, "n": 3},
    ] and not refused


def test_two_files_of_lines_are_a_table(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    prompts = put(tmp_path, "prompts.txt", "a dog\r\na cat\r\na bird\r\n")
    videos = put(tmp_path, "videos.txt", "videos/000.mp4\nvideos/001.mp4\nvideos/002.mp4\n")
    assert captions(folder, prompts) == captions(folder, videos) == (THREE, [])
    prompts.write_text("a dog\na cat\n")
    with pytest.raises(InputError, match="has 2 lines and .*videos.txt 3"):
        captions(folder, prompts)
    videos.unlink()
    with pytest.raises(InputError, match="videos.txt or video.txt with as many lines isn't beside it"):
        captions(folder, prompts)


@pytest.mark.parametrize(
    ("name", "text", "kept", "refused"),
    [
        (
            "comma.csv", 'file,caption\n000.mp4,A dog runs, a cat sleeps\n001.mp4,"quoted, fine"\n002.mp4,plain\n',
            {"001.mp4": "quoted, fine", "002.mp4": "plain"}, "row 2 has 4 cells|3 cells for 2 columns",
        ),
        (
            "open.tsv", 'file\tcaption\n000.mp4\t"Look at this dog\n001.mp4\ta cat\n002.mp4\ta bird\n',
            {"001.mp4": CAT, "002.mp4": BIRD}, "row 2: its quotes don't pair up",
        ),
        (
            "closed_later.csv", 'file,caption\n000.mp4,"Look at this dog\n001.mp4,a cat"\n002.mp4,a bird\n',
            {"001.mp4": 'a cat"', "002.mp4": BIRD}, "swallows the next row",
        ),
        (
            "stray.csv", 'file,caption\n000.mp4,"a" dog\n001.mp4,a "cat"\n002.mp4,a bird\n',
            {"001.mp4": 'a "cat"', "002.mp4": BIRD}, "row 2: its quotes don't pair up",
        ),
        (
            "lines.jsonl", '{"file": "000.mp4", "caption": \n{"file": "001.mp4", "caption": "a cat"}\n[1]\n',
            {"001.mp4": CAT}, "row 1 is not JSON",
        ),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_read_is_refused_alone(
    tmp_path: Path, name: str, text: str, kept: dict[str, str], refused: str
) -> None:
    found, refusals = candidates(folder_of(tmp_path), put(tmp_path, name, text))
    assert {c.name: c.fields["caption"] for c in found} == kept
    bad = [entry["detail"] for entry in refusals if entry["reason"] == "bad caption row"]
    assert bad and any(part in bad[0] for part in refused.split("|"))


@pytest.mark.parametrize(
    ("value", "caption"),
    [
        (None, "empty caption"), (math.nan, "empty caption"), ("NaN", "empty caption"), (" ", "empty caption"),
        ("\u200b\ufeff", "empty caption"), (7, "caption not text"), (True, "caption not text"),
        ("\ud83d a dog", "caption not UTF-8"), ("a\0b", "caption binary"), ([], "empty caption"),
        ([["a"]], "caption not text"), ({"short": 3}, "caption not text"),
        ("a dog ", DOG), ([DOG, None, CAT], {"0": DOG, "2": CAT}), ({"short": None, "long": DOG}, {"long": DOG}),
        ([DOG], DOG), ({"short": DOG, "long": CAT}, {"short": DOG, "long": CAT}), ("none of them", "none of them"),
    ],
)  # fmt: skip
def test_nothing_but_text_is_a_caption(tmp_path: Path, value: Any, caption: Any) -> None:
    folder = folder_of(tmp_path, "000.mp4", "001.mp4")
    rows = [{"file": "000.mp4", "caption": value}, {"file": "001.mp4", "caption": CAT}]
    table = put(tmp_path, "t.jsonl", "\n".join(map(json.dumps, rows)))
    found, refused = captions(folder, table)
    if isinstance(caption, str) and refused:
        assert (found, refused) == ({"001.mp4": CAT}, [(caption, "000.mp4")])
    else:
        assert (found, refused) == ({"000.mp4": caption, "001.mp4": CAT}, [])


def test_bytes_of_another_encoding_are_refused_with_their_column_or_read_as_told(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    text = "file,caption,author\n000.mp4,a dog,José\n001.mp4,un café,Anna\n002.mp4,a bird,Bob\n"
    table = put(tmp_path, "t.csv", text.encode("cp1252"))
    found, refused = candidates(folder, table)
    assert [c.name for c in found] == ["002.mp4"]
    assert [(e["reason"], e["file"]) for e in refused] == [
        ("row not UTF-8", "000.mp4"),
        ("caption not UTF-8", "001.mp4"),
    ]
    assert "byte 0xe9 at position 3 of column 'author'; encoding=" in refused[0]["detail"]
    told, refused = candidates(folder, table, encoding="cp1252")
    assert (
        told[0].fields == {"caption": DOG, "author": "José"} and told[1].fields["caption"] == "un café" and not refused
    )
    with pytest.raises(InputError, match="is not shift_jis"):
        candidates(folder, table, encoding="shift_jis")


def test_columns_of_numbers_are_numbers_and_names_stay_words(tmp_path: Path) -> None:
    rows = [
        "video,caption,aesthetic score,motion,n,id,long,ok,mixed",
        "000.mp4,a dog,5.1,3.3,30,007,12345678901234567890,True,1",
        "001.mp4,a cat,4,0.2,25,012,1,false,x",
        "002.mp4,a bird,6e-1,,24,100,2,,",
    ]
    found, _ = candidates(folder_of(tmp_path), put(tmp_path, "t.csv", "\n".join(rows)))
    fields = [{k: v for k, v in c.fields.items() if k != "caption"} for c in found]
    big = "12345678901234567890"
    assert fields == [
        {"aesthetic score": 5.1, "motion": 3.3, "n": 30, "id": "007", "long": big, "ok": True, "mixed": "1"},
        {"aesthetic score": 4.0, "motion": 0.2, "n": 25, "id": "012", "long": "1", "ok": False, "mixed": "x"},
        {"aesthetic score": 0.6, "motion": None, "n": 24, "id": "100", "long": "2", "ok": None, "mixed": ""},
    ]
    assert type(fields[0]["n"]) is int


def test_columns_can_be_told_and_captions_of_several_columns_have_their_names(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    table = put(
        tmp_path, "t.csv", "clip,short,long,text\n000.mp4,dog,a dog runs,x\n001.mp4,,a cat,y\n002.mp4,bird,,z\n"
    )
    found, refused = candidates(folder, table, columns="file:clip,caption:short+long")
    assert [c.fields for c in found] == [
        {"captions": {"short": "dog", "long": "a dog runs"}, "text": "x"},
    ] and [e["reason"] for e in refused] == ["empty caption", "empty caption"]
    for columns, message in (
        ("file:clip,caption:nothing", "doesn't have the columns told .file 'clip', caption 'nothing'"),
        ("clip", "is not of the form file:NAME"),
        ("fiel:clip", "'fiel' is no use of a column; did you mean 'file'"),
        ("file:a+b", "only captions"),
    ):
        with pytest.raises(InputError, match=message):
            candidates(folder, table, columns=columns)
    with pytest.raises(InputError, match=r"2 columns named 'text'"):
        candidates(folder, put(tmp_path, "twice.csv", "file,text,text\n000.mp4,a,b\n"))


def test_several_rows_of_a_file_are_several_captions_and_parts_are_samples(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    rows = "file,caption,start,end\n000.mp4,first,0.0,0.5\n000.mp4,second,0:00.5,00:00:01\n"
    rows += "001.mp4,all,,\n001.mp4,again,,\n"
    more = "002.mp4,backwards,2,1\n002.mp4,never,soon,\n002.mp4,rest,1.5,\n"
    found, refused = captions(folder, put(tmp_path, "t.csv", rows + more))
    assert found == {
        "000.mp4#0-0.5": "first", "000.mp4#0.5-1": "second", "001.mp4": {"0": "all", "1": "again"},
        "002.mp4#1.5-inf": "rest",
    }  # fmt: skip
    assert refused == [("bad caption row", "002.mp4")] * 2


@pytest.mark.parametrize(
    ("name", "text", "columns", "kept", "refused"),
    [
        (  # as pandas writes lists
            "lists.csv",
            "file,caption\n000.mp4,\"['a dog', 'the dog']\"\n001.mp4,\"[\"\"a cat\"\"]\"\n002.mp4,[bird]\n",
            None, {"000.mp4": {"0": DOG, "1": "the dog"}, "001.mp4": CAT, "002.mp4": "[bird]"}, [],
        ),
        (  # Panda-70M
            "panda.csv",
            "videoID,url,timestamp,caption\n"
            "000,http://x,\"[['0:00:00.000', '0:00:00.500'], ['0:00:00.500', '0:00:01.5']]\","
            "\"['a dog', 'a cat']\"\n001,http://x,\"[['0:00:00.000', '0:00:00.500']]\",['a bird']\n"
            "002,http://x,\"[[0, 1], [1, 2]]\",one alone\n",
            "file:videoID", {"000.mp4#0-0.5": DOG, "000.mp4#0.5-1.5": CAT, "001.mp4#0-0.5": BIRD},
            ["row 4: it names 2 parts of its file and has 1 captions"],
        ),
        (  # Koala-36M; a date is no range
            "koala.csv",
            "file,timestamp,caption\n000.mp4,\"['0:00:00.000', '0:00:00,750']\",a dog\n"
            "001.mp4,2024-05-01 10:00:00,a cat\n",
            None, {"000.mp4#0-0.75": DOG, "001.mp4": CAT}, [],
        ),
        (  # ActivityNet
            "activity.json",
            json.dumps({"000": {"duration": 2, "timestamps": [[0, 0.5], [0.25, 1]], "sentences": [DOG, CAT]}}),
            None, {"000.mp4#0-0.5": DOG, "000.mp4#0.25-1": CAT}, [],
        ),
        (  # a spreadsheet in a country of decimal commas
            "comma.csv", "file;caption;start;end;score;words\n000.mp4;a dog;0,0;0,5;1,25;1,5\n001.mp4;a cat;;;2;two\n",
            None, {"000.mp4#0-0.5": DOG, "001.mp4": CAT}, [],
        ),
        (
            "times.csv",
            'file,caption,start,end\n000.mp4,a dog,0s,1.5s\n001.mp4,a cat,"00:00:00,250",\n002.mp4,a bird,zero,\n',
            None, {"000.mp4#0-1.5": DOG, "001.mp4#0.25-inf": CAT}, ["row 4: 'zero' is no time in seconds"],
        ),
        ("excel.csv", 'file,caption\n="000.mp4",="a dog"\n', None, {"000.mp4": DOG}, []),
        ("one.jsonl", json.dumps([{"file": "000.mp4", "caption": DOG}], indent=1), None, {"000.mp4": DOG}, []),
        (
            "either.csv", "file,text,caption\n000.mp4,a dog,\n001.mp4,x,a cat\n",
            None, {"000.mp4": DOG, "001.mp4": CAT}, [],
        ),
    ],
)  # fmt: skip
def test_captions_and_parts_as_data_sets_and_spreadsheets_have_them(
    tmp_path: Path, name: str, text: str, columns: str | None, kept: dict[str, Any], refused: list[str]
) -> None:
    found, refusals = candidates(folder_of(tmp_path), put(tmp_path, name, text), columns=columns)
    assert {c.name: c.fields.get("captions", c.fields.get("caption")) for c in found} == kept
    assert [entry["detail"] for entry in refusals if entry["reason"] == "bad caption row"] == refused
    scores = [c.fields["score"] for c in found if "score" in c.fields]
    assert scores in ([], [1.25, 2.0])


def test_lines_of_two_files_are_parted_by_line_ends_alone(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    put(tmp_path, "videos.txt", "000.mp4\r\n001.mp4\r\n\r\n")
    found, _ = captions(folder, put(tmp_path, "prompts.txt", "a\u2028dog\x0cruns\x85\na cat\n"))
    assert found == {"000.mp4": "a\u2028dog\x0cruns", "001.mp4": CAT}


def test_a_caption_in_a_sidecars_other_field(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    put(folder, "000.json", json.dumps({"prompt": DOG, "score": 1}))
    put(folder, "001.json", json.dumps({"text": "not this", "caption": CAT}))
    put(folder, "002.json", json.dumps({"text": "not this"}))
    put(folder, "002.txt", BIRD)
    found, refused = candidates(folder, None)
    assert [c.fields for c in found] == [
        {"caption": DOG, "score": 1}, {"caption": CAT, "text": "not this"}, {"caption": BIRD, "text": "not this"},
    ] and not refused  # fmt: skip


def test_paths_that_could_be_two_files_or_another_file_are_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "a/000.mp4", "b/000.mp4", "b/001.mp4", "002.mp4", "003.mp4")
    rows = [
        "000.mp4,two files have it", "/old/b/001.mp4,of another machine", "/old/c/001.mp4,another folder's",
        "/old/x/002.mp4,one of two", "/old/y/002.mp4,two of two", "003.mp4,itself", "/old/003.mp4,not itself",
        "B/000.MP4,by its folder", "nowhere.mp4,none",
    ]  # fmt: skip
    found, refused = candidates(folder, put(tmp_path, "t.csv", "file,caption\n" + "\n".join(rows)))
    assert {c.name: c.fields["caption"] for c in found} == {
        "b/001.mp4": "of another machine", "003.mp4": "itself", "b/000.mp4": "by its folder",
    }  # fmt: skip
    details = {e["file"]: e["detail"] for e in refused if e["reason"] == "caption without file"}
    assert "2 files have this name" in details["000.mp4"]
    assert "b/001.mp4 has its name, in another folder" in details["/old/c/001.mp4"]
    assert "belongs to 2 different paths" in details["/old/x/002.mp4"] and "/old/y/002.mp4" in details
    assert "the row of that very path" in details["/old/003.mp4"]
    assert "there is no such file" in details["nowhere.mp4"]
    told, _ = captions(folder, tmp_path / "t.csv", root="/old/x")
    assert told["002.mp4"] == "one of two"
    with pytest.raises(
        InputError, match=r"none of its 1 rows names a file of .*'gone.mp4', the folder '002.mp4': say root="
    ):
        candidates(folder, put(tmp_path, "u.csv", "file,caption\ngone.mp4,x\n"))


def test_sidecars_of_every_kind(tmp_path: Path) -> None:
    names = (
        "full.mp4",
        "json.mp4",
        "named.mp4",
        "meta.mp4",
        "kohya.mp4",
        "upper.mp4",
        "marked.mp4",
        "bad.mp4",
        "list.mp4",
    )
    folder = folder_of(tmp_path, *names)
    for name, content in {
        "full.mp4.txt": DOG, "json.json": {"caption": CAT, "score": 2}, "named.mp4.json": {"captions": [DOG, BIRD]},
        "meta.json": {"fps": 3, "caption": None}, "meta.txt": "of the text", "kohya.caption": "of kohya",
        "upper.TXT": "in capitals", "marked.txt": "marked".encode("utf-16"), "bad.json": "{", "list.json": [1],
    }.items():  # fmt: skip
        put(folder, name, content if isinstance(content, (str, bytes)) else json.dumps(content))
    found, refused = candidates(folder)
    assert {c.name.removesuffix(".mp4"): c.fields for c in found} == {
        "full": {"caption": DOG}, "json": {"caption": CAT, "score": 2}, "named": {"captions": {"0": DOG, "1": BIRD}},
        "meta": {"caption": "of the text", "fps": 3}, "kohya": {"caption": "of kohya"},
        "upper": {"caption": "in capitals"}, "marked": {"caption": "marked"},
    }  # fmt: skip
    assert [(e["file"], e["reason"]) for e in refused] == [("bad.mp4", "bad caption"), ("list.mp4", "bad caption")]


def test_texts_in_a_folder_of_their_own(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "a/000.mp4", "001.mp4")
    (tmp_path / "labels/a").mkdir(parents=True)
    put(tmp_path, "labels/a/000.txt", DOG)
    put(tmp_path, "labels/001.txt", CAT)
    assert captions(folder, tmp_path / "labels") == ({"001.mp4": CAT, "a/000.mp4": DOG}, [])


def test_the_metadata_of_a_hugging_face_folder_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_of(tmp_path)
    put(folder, "metadata.csv", "file_name,text\n000.mp4,a dog\n001.mp4,a cat\n002.mp4,a bird\n")
    assert captions(folder) == (THREE, [])
    assert "file from 'file_name', caption from 'text'" in capsys.readouterr().out
    put(folder, "metadata.csv", "file,text\n000.mp4,not of Hugging Face\n")
    assert captions(folder)[0] == {}


def test_what_is_passed_over_is_counted_and_captioned_files_of_other_kinds_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folder_of(tmp_path, "000.mp4", "000.m4a", "song.m4a", "doc.pdf", "000.jpg", "own.mp4", "own.png")
    for name in ("000.txt", "song.txt", "own.txt", "own.png.txt", "alone.txt"):
        put(folder, name, f"caption of {name}")
    found, refused = captions(folder)
    assert found == {
        "000.mp4": "caption of 000.txt", "own.mp4": "caption of own.txt", "own.png": "caption of own.png.txt",
    }  # fmt: skip
    assert refused == [("unknown kind", "song.m4a"), ("thumbnail", "000.jpg")]
    printed = capsys.readouterr().out
    assert "passed over: 3 files of other kinds (m4a 2, pdf 1)" in printed
    assert "passed over: 1 texts beside no video or image, such as alone.txt" in printed


def test_a_table_that_is_none_is_one_line(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    for name, content, message in (
        ("t.xlsx", b"PK", "must be a .csv"), ("t.csv", "", "first line must name"), ("t.json", "{", "is not JSON"),
        ("t.json", "[]", "must hold a list"), ("t.parquet", b"no", "cannot read"),
        ("t.csv", "file,caption\n", "has no row"),
        ("t.csv", "a,b\n1,2\n", "first line must name a column for the file"), ("t.jsonl", "\n", "has no row"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message) as caught:
            captions(folder, put(tmp_path, name, content))
        assert "\n" not in str(caught.value)
