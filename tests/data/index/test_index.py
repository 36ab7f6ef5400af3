"""The index counts what is there: what can't be used is named with its cause, what changed is indexed anew."""

from __future__ import annotations

import gzip
import json
import os
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds

from sora_train.config.schema import Probe
from sora_train.core.cli import InputError
from sora_train.data.index.captions import parse_captions
from sora_train.data.index.files import ignored_fields
from sora_train.data.index.index import load_index, load_rows
from sora_train.data.index.make import index_shards
from sora_train.data.index.patterns import expand
from sora_train.data.index.places import index_path
from sora_train.data.read.decode import DecodeError, Limits
from sora_train.data.read.store import Store
from tests.data import damaged_clips

Write = Callable[[Path, list[dict[str, Any]]], str]
Make = Callable[[int], dict[str, Any]]


def indexed(shard: str) -> Any:
    index_shards([shard], workers=1)
    return load_index([shard])


def test_every_figure_is_counted(corpus: list[str]) -> None:
    index = load_index(corpus)
    assert len(index) == 24 and index.usable.all()
    assert index.first.tolist() == [0, 8, 16, 24] and index.shard.tolist() == [0] * 8 + [1] * 8 + [2] * 8
    assert index.key.tolist() == [f"{n:05d}" for n in range(24)]
    assert index.frames.tolist() == [1, 9, 17, 33] * 6
    assert index.fps.tolist() == [0.0, 8.0, 8.0, 16.0] * 6
    assert index.height.tolist() == ([64] * 4 + [48] * 4 + [96] * 4) * 2
    assert index.width.tolist() == ([64] * 4 + [96] * 4 + [48] * 4) * 2
    assert index.duration.tolist() == [0.0, 9 / 8, 17 / 8, 33 / 16] * 6
    assert index.extension.tolist() == ["png", "mp4", "mp4", "mp4"] * 6


def test_offsets_lead_to_the_members_that_webdataset_reads(corpus: list[str]) -> None:
    index = load_index(corpus)
    samples = list(wds.WebDataset(corpus, shardshuffle=False, empty_check=False))
    assert [s["__key__"] for s in samples] == index.key.tolist()
    for row, entry in enumerate(samples):
        path, extension, (offset, size, _) = index.member(row)
        with Path(path).open("rb") as file:
            file.seek(offset)
            assert file.read(size) == entry[extension]


def test_captions_come_from_txt_and_from_every_caption_of_the_json(corpus: list[str]) -> None:
    index = load_index(corpus)
    assert index.captions(2) == (["block number 2"], {})
    captions, fields = index.captions(1)
    assert captions == ["block 1", "a block of light, number 1"]
    assert fields["n"] == 1
    assert index.caption_chars[1] == len("a block of light, number 1")


@pytest.mark.parametrize(
    ("data", "extension", "captions"),
    [
        (b" a cat \n", "txt", ["a cat"]),
        ("a réd 猫".encode(), "txt", ["a réd 猫"]),
        (b'{"caption": "a cat", "fps": 3}', "json", ["a cat"]),
        (b'{"captions": {"a": "x", "b": "y"}, "caption": "z"}', "json", ["x", "y"]),
        (b'{"captions": null, "caption": "z"}', "json", ["z"]),
        (b'{"captions": {"a": null}, "caption": "z"}', "json", ["z"]),
        (b'{"captions": ["x", null, "y"]}', "json", ["x", "y"]),
        (b'{"caption": ["x", "y"]}', "json", ["x", "y"]),
        (b'{"caption": {"short": "x", "long": NaN}}', "json", ["x"]),
    ],
)
def test_captions_that_parse(data: bytes, extension: str, captions: list[str]) -> None:
    assert parse_captions(data, extension)[0] == captions


@pytest.mark.parametrize(
    ("data", "extension", "cause"),
    [
        (b"a \xff cat", "txt", "caption_not_utf8"),
        (b"  \n", "txt", "no_caption"),
        (b"{}", "json", "no_caption"),
        (b'{"captions": {}}', "json", "no_caption"),
        (b'{"captions": {"a": "x", "b": ""}}', "json", "no_caption"),
        (b'{"caption": ', "json", "caption_json"),
        (b'["a cat"]', "json", "caption_json"),
        (b'{"caption": null}', "json", "no_caption"),
        (b'{"caption": NaN}', "json", "no_caption"),
        (b'{"caption": "None"}', "json", "no_caption"),
        (b"nan", "txt", "no_caption"),
        ("\u200b".encode(), "txt", "no_caption"),
        (b'{"caption": 7}', "json", "caption_type"),
        (b'{"caption": [["a"]]}', "json", "caption_type"),
        (b'{"caption": {"a": {"b": "c"}}}', "json", "caption_type"),
        (b'{"caption": "a happy dog \\ud83d"}', "json", "caption_not_utf8"),
    ],
)
def test_captions_that_do_not(data: bytes, extension: str, cause: str) -> None:
    with pytest.raises(DecodeError) as caught:
        parse_captions(data, extension)
    assert caught.value.cause == cause


def test_bad_samples_are_named_with_their_cause_and_the_good_one_stays(
    tmp_path: Path, write_samples: Write, make_sample: Make
) -> None:
    good = make_sample(2)
    video = good["mp4"]
    samples = [
        good,
        {"__key__": "nocaption", "mp4": video},
        {"__key__": "latin1", "mp4": video, "txt": "caf\xe9".encode("latin-1")},
        {"__key__": "liar", "mp4": b"#!/bin/sh\necho this is no video\n", "txt": b"a script"},
        {"__key__": "playlist", "mp4": b"#EXTM3U\nhttp://example.com/a.ts\n", "txt": b"a playlist"},
        {"__key__": "cut", "mp4": video[:200], "txt": b"a video cut short"},
        {"__key__": "hollow", "mp4": b"", "txt": b"nothing"},
        {"__key__": "fake", "png": b"GIF89a not allowed", "txt": b"a picture"},
        {"__key__": "textonly", "txt": b"only words"},
    ]
    index = indexed(write_samples(tmp_path / "s.tar", samples))
    causes = dict(zip(index.key.tolist(), index.refused.tolist(), strict=True))
    assert causes == {
        "00002": "", "nocaption": "no_caption", "latin1": "caption_not_utf8", "liar": "not_a_video",
        "playlist": "not_a_video", "cut": "no_video", "hollow": "empty", "fake": "undecodable",
        "textonly": "no_media",
    }  # fmt: skip
    details = dict(zip(index.key.tolist(), index.detail.tolist(), strict=True))
    assert details["latin1"] == "byte 3 of the caption is not UTF-8"
    assert "nocaption.txt" in details["nocaption"] and "nocaption.json" in details["nocaption"]
    assert "#!/bin/s" in details["liar"]
    assert index.usable.tolist() == [True] + [False] * 8


def test_a_shard_of_nothing_usable_is_an_error_with_the_causes(tmp_path: Path, write_samples: Write) -> None:
    shard = write_samples(tmp_path / "s.tar", [{"__key__": "a", "mp4": b"no", "txt": b"x"}])
    with pytest.raises(InputError, match=r"no usable sample in 1 shard.*s\.tar: not_a_video 1"):
        indexed(shard)
    assert len(load_index([shard], allow_empty=True)) == 1


@pytest.mark.parametrize("keep", [0, 100, 600, 2000])
def test_a_truncated_tar_is_refused_by_name(tmp_path: Path, write_samples: Write, make_sample: Make, keep: int) -> None:
    shard = Path(write_samples(tmp_path / "s.tar", [make_sample(n) for n in (1, 2)]))
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"s\.tar"):
        indexed(str(shard))


def test_what_is_no_tar_is_refused_by_name_and_other_shards_are_not(tmp_path: Path, corpus: list[str]) -> None:
    page = tmp_path / "page.tar"
    page.write_bytes(b"<html>404 not found</html>" * 50)
    with pytest.raises(InputError, match=r"page\.tar: tar_not_a_tar 1; begins with b'<html>404"):
        indexed(str(page))
    index = load_index([str(page), corpus[0]])
    assert index.usable.tolist() == [False] + [True] * 8


def test_a_changed_shard_is_indexed_anew_and_an_unchanged_one_is_left_alone(
    tmp_path: Path, write_samples: Write, make_sample: Make
) -> None:
    shard = write_samples(tmp_path / "s.tar", [make_sample(0)])
    first = indexed(shard)
    written = index_path(shard).stat().st_mtime_ns
    assert indexed(shard).fingerprint == first.fingerprint
    assert index_path(shard).stat().st_mtime_ns == written
    write_samples(tmp_path / "s.tar", [make_sample(0), make_sample(4), make_sample(8)])
    with pytest.raises(InputError, match="no current index"):
        load_index([shard])
    second = indexed(shard)
    assert (len(first), len(second)) == (1, 3)
    assert first.fingerprint != second.fingerprint


def test_the_fingerprint_changes_with_content_and_with_order_of_the_shards(corpus: list[str], tmp_path: Path) -> None:
    whole = load_index(corpus).fingerprint
    assert whole == load_index(corpus).fingerprint
    assert len({whole, load_index(corpus[::-1]).fingerprint, load_index(corpus[:2]).fingerprint}) == 3


def test_the_fingerprint_does_not_change_with_the_folder(corpus: list[str], own_corpus: list[str]) -> None:
    assert load_index(own_corpus).fingerprint == load_index(corpus).fingerprint


def test_unknown_members_are_kept_and_ignored_and_folders_are_part_of_the_key(
    tmp_path: Path, write_samples: Write, make_sample: Make
) -> None:
    entry = make_sample(0) | {"__key__": "dir/a", "ref0.mp4": b"later", "mask.mp4": b"later", "flac": b"later"}
    index = indexed(write_samples(tmp_path / "s.tar", [entry]))
    assert index.key.tolist() == ["dir/a"] and index.extension.tolist() == ["png"] and index.usable.all()


def test_links_and_devices_in_a_tar_are_not_followed(tmp_path: Path, make_sample: Make, write_samples: Write) -> None:
    shard = write_samples(tmp_path / "s.tar", [make_sample(0)])
    with tarfile.open(shard, "a") as tar:
        for kind, name in ((tarfile.SYMTYPE, "evil.mp4"), (tarfile.LNKTYPE, "hard.mp4"), (tarfile.CHRTYPE, "dev.mp4")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
    assert indexed(shard).key.tolist() == ["00000"]


def test_plain_fields_of_the_json_become_columns_whatever_each_shard_has(
    tmp_path: Path, write_samples: Write, make_sample: Make
) -> None:
    def shard(name: str, *fields: dict[str, Any]) -> str:
        entries = []
        for number, more in enumerate(fields):
            media = {k: v for k, v in make_sample(0).items() if k == "png"}
            text = json.dumps({"caption": "a", **more}).encode()
            entries.append({"__key__": f"{name}{number}", **media, "json": text})
        return write_samples(tmp_path / f"{name}.tar", entries)

    shards = [
        shard("a", {"score": 5, "width": 1, "nsfw": False, "nested": {"x": 1}}, {"score": 6.5, "place": "sea"}),
        shard("b", {"score": "high", "captions_from": "model"}, {"bad name": 1}),
    ]
    index_shards(shards, workers=1)
    index = load_index(shards)
    assert index.columns["score"].tolist() == ["5", "6.5", "high", ""], "words, as one shard has words"
    assert index.columns["meta.place"].tolist() == ["", "sea", "", ""]
    assert index.columns["nsfw"][0] == 0.0 and np.isnan(index.columns["nsfw"][1:]).all()
    assert index.columns["meta.width"][0] == 1.0 and index.columns["width"][0] == 64, "ours keeps the plain name"
    assert {"meta.nested", "meta.bad name", "meta.caption"}.isdisjoint(index.columns)
    assert load_index(shards[:1]).columns["score"].tolist() == [5.0, 6.5]


def test_fields_that_no_file_can_hold_or_that_are_missing_do_not_spoil_their_column(
    tmp_path: Path, write_samples: Write, make_sample: Make
) -> None:
    png = make_sample(0)["png"]
    jsons = [
        b'{"caption": "a", "title": "wow \\ud83d", "score": NaN, "aesthetic score": 5, "fps": 24, "tags": ["x"]}',
        b'{"caption": "b", "title": "plain", "score": 1e400, "aesthetic score": 4.5, "tags": {"y": 1}}',
        b'{"caption": "c", "score": null, "fps": 30, "2x": 1}',
    ]
    entries = [{"__key__": f"{n}", "png": png, "json": data} for n, data in enumerate(jsons)]
    shard = write_samples(tmp_path / "s.tar", entries)
    index = indexed(shard)
    assert index.usable.all()
    assert index.columns["title"].tolist() == ["wow \ufffd", "plain", ""]
    assert np.isnan(index.columns["score"][[0, 2]]).all() and index.columns["score"][1] == np.inf
    assert index.columns["aesthetic_score"].tolist()[:2] == [5.0, 4.5]
    assert index.columns["meta_fps"].tolist()[::2] == [24.0, 30.0] and index.columns["fps"].tolist() == [0.0] * 3
    assert ignored_fields(shard, Store()) == {"tags": "lists or maps", "2x": "its name"}


def test_a_json_without_captions_leaves_them_to_the_txt(
    tmp_path: Path, write_samples: Write, make_sample: Make
) -> None:
    png = make_sample(0)["png"]
    jsons = [
        b'{"url": "u"}',
        b'{"caption": null, "url": "v"}',
        b'{"caption": "of the json"}',
        b'{"caption": "", "n": 1}',
    ]
    entries = [{"__key__": f"{n}", "png": png, "json": data, "txt": b"of the txt"} for n, data in enumerate(jsons)]
    entries.append({"__key__": "4", "png": png, "json": b'{"url": "w"}'})
    index = indexed(write_samples(tmp_path / "s.tar", entries))
    texts = [index.captions(row)[0] for row in range(4)]
    assert texts == [["of the txt"], ["of the txt"], ["of the json"], ["of the txt"]]
    assert index.fields(1) == {"caption": None, "url": "v"} and index.fields(2) == {"caption": "of the json"}
    assert index.columns["url"].tolist() == ["u", "v", "", "", "w"]
    assert (
        index.refused[4] == "no_caption" and "4.json has neither caption nor captions (it has url)" in index.detail[4]
    )


def test_an_index_stands_in_the_cache_where_the_folder_of_its_shard_cannot_be_written(
    own_corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, store = Path(own_corpus[0]).parent, Store(tmp_path / "cache")
    writable = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: writable(path, mode) and Path(path) != folder)
    index_shards(own_corpus, workers=1, store=store)
    assert index_path(own_corpus[0], store).parent == folder, "the index that came with the folder is taken"
    index_path(own_corpus[0]).unlink()
    index_path(own_corpus[1]).write_bytes(b"PAR1 of another time")
    index_shards(own_corpus, workers=1, store=store)
    places = [index_path(shard, store).parent for shard in own_corpus]
    assert places == [tmp_path / "cache/index", tmp_path / "cache/index", folder]
    assert len(load_index(own_corpus, store)) == 24
    with pytest.raises(InputError, match=r"can't be written, so the index needs a folder; set data\.cache\.folder"):
        index_shards(own_corpus, workers=1)


def test_shards_of_one_stem_have_their_own_indexes(tmp_path: Path, write_samples: Write, make_sample: Make) -> None:
    shards = [write_samples(tmp_path / f"data.part{n}", [make_sample(n)]) for n in range(2)]
    index_shards(shards, workers=1)
    assert load_index(shards).key.tolist() == ["00000", "00001"]
    twins = [write_samples(tmp_path / name, [make_sample(0)]) for name in ("a", "a.tar")]
    with pytest.raises(InputError, match=r"a and .*a\.tar would have the same index; rename one"):
        index_shards(twins, workers=1)


def test_a_pipe_is_no_shard_and_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.tar")
    with pytest.raises(InputError, match="no shard at"):
        expand([str(tmp_path / "*.tar")])


def test_a_compressed_tar_is_named(tmp_path: Path, corpus: list[str]) -> None:
    (tmp_path / "x.tar").write_bytes(gzip.compress(Path(corpus[0]).read_bytes()))
    with pytest.raises(InputError, match=r"is compressed \(gzip\): unpack it"):
        indexed(str(tmp_path / "x.tar"))


def test_further_members_and_caption_lengths_are_kept(tmp_path: Path, write_samples: Write, make_sample: Make) -> None:
    entry = make_sample(1) | {"ref0.mp4": b"a reference", "flac": b"sound"}
    shard = write_samples(tmp_path / "s.tar", [entry, make_sample(0)])
    index = indexed(shard)
    more = json.loads(index.columns["more"][0])
    assert set(more) == {"ref0.mp4", "flac"} and index.columns["more"][1] == ""
    offset, size, crc = more["ref0.mp4"]
    assert Path(shard).read_bytes()[offset : offset + size] == b"a reference" and crc == zlib.crc32(b"a reference")
    assert index.caption_lengths[0].tolist() == [len("block 1"), len("a block of light, number 1")]


def test_a_caption_that_changed_after_indexing_is_refused(own_corpus: list[str]) -> None:
    index = load_index(own_corpus)
    data = bytearray(Path(own_corpus[0]).read_bytes())
    data[int(index.caption_offset[2]) + 1] ^= 1
    Path(own_corpus[0]).write_bytes(data)
    with pytest.raises(DecodeError, match="checksum: the caption"):
        index.captions(2)


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (b"a\0b", "caption_binary"),
        (b"x" * ((1 << 20) + 1), "caption_too_long"),
        ("a".encode("utf-16"), "caption_not_utf8"),
    ],
)
def test_captions_that_are_no_captions(data: bytes, cause: str) -> None:
    with pytest.raises(DecodeError) as caught:
        parse_captions(data, "txt")
    assert caught.value.cause == cause


def test_a_byte_order_mark_is_no_part_of_a_caption() -> None:
    assert parse_captions(b"\xef\xbb\xbfa cat", "txt")[0] == ["a cat"]


def test_a_member_that_comes_twice_is_refused(tmp_path: Path, write_samples: Write, make_sample: Make) -> None:
    shard = write_samples(tmp_path / "s.tar", [make_sample(0), make_sample(0), make_sample(4)])
    assert indexed(shard).refused.tolist() == ["duplicate", ""]


def test_an_index_of_another_shard_of_the_same_name_and_size_is_not_taken(own_corpus: list[str]) -> None:
    """Two shards of the demo have the same size now and then; only what is in them tells them apart."""
    first, second = own_corpus[:2]
    data = bytearray(Path(first).read_bytes())
    at = data.index(b"00000.png")
    data[at : at + 5] = b"90000"
    total = sum(data[at : at + 148]) + 8 * 32 + sum(data[at + 156 : at + 512])
    data[at + 148 : at + 156] = f"{total:06o}\0 ".encode()
    Path(first).write_bytes(data)
    with pytest.raises(InputError, match="no current index"):
        load_index([first])
    assert indexed(first).key[0] == "90000"
    index_path(second).write_bytes(index_path(first).read_bytes())
    with pytest.raises(InputError, match="no current index"):
        load_index([second])


def test_a_shard_that_was_only_touched_or_copied_keeps_its_index(own_corpus: list[str]) -> None:
    os.utime(own_corpus[0], (1, 1))
    written = index_path(own_corpus[0]).stat().st_mtime_ns
    index_shards(own_corpus, workers=1)
    assert index_path(own_corpus[0]).stat().st_mtime_ns == written


def test_other_limits_index_anew(tmp_path: Path, write_samples: Write, make_sample: Make) -> None:
    shard = write_samples(tmp_path / "s.tar", [make_sample(0), make_sample(4)])
    index_shards([shard], workers=1, limits=Limits(pixels=64 * 64))
    assert load_index([shard]).refused.tolist() == ["", "pixels"]
    assert indexed(shard).refused.tolist() == ["", ""]


def test_an_index_serves_whoever_asks_for_as_much_as_was_decoded_or_less(own_corpus: list[str]) -> None:
    def written() -> list[int]:
        return [index_path(shard).stat().st_mtime_ns for shard in own_corpus]

    every, first = written(), load_index(own_corpus).fingerprint  # the fixture's, for which every frame was decoded
    for probe in (None, *Probe):
        index_shards(own_corpus, workers=1, probe=probe)
    assert written() == every
    for shard in own_corpus:
        index_path(shard).unlink()
    index_shards(own_corpus, workers=1, probe=Probe.packets)
    headers = written()
    index_shards(own_corpus, workers=1)  # who asks for nothing takes what there is
    assert written() == headers and load_index(own_corpus).fingerprint == first
    index_shards(own_corpus, workers=1, probe=Probe.all)
    assert not set(headers) & set(written())


def test_unless_told_otherwise_a_file_that_is_damaged_inside_is_left_out(tmp_path: Path) -> None:
    frames = damaged_clips.footage(np.random.default_rng(0))
    clip = bytearray(damaged_clips.clean("libx264", {"preset": "veryfast"}, 12, "mp4", frames, tmp_path))
    place = len(clip) * 3 // 4
    clip[place : place + 40] = bytes(b ^ 0x55 for b in clip[place : place + 40])
    shard = str(tmp_path / "a.tar")
    with wds.TarWriter(shard) as tar:
        tar.write({"__key__": "damaged", "mp4": bytes(clip), "txt": b"x"})
    index_shards([shard], workers=1)
    assert load_rows(shard, Store())["refused"].to_pylist() == ["damaged"]
    index_path(shard).unlink()
    index_shards([shard], workers=1, probe=Probe.packets)
    assert load_rows(shard, Store())["refused"].to_pylist() == [""], "found when training decodes it"


def test_what_is_in_the_place_of_an_index_and_is_none_is_not_overwritten(own_corpus: list[str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"mine": [1]}), index_path(own_corpus[0]))
    with pytest.raises(InputError, match="is none; move it away"):
        index_shards(own_corpus, workers=1)
    index_path(own_corpus[0]).write_bytes(b"PAR1 torn")
    index_shards(own_corpus, workers=1)
    assert len(load_index(own_corpus)) == 24


def test_a_share_of_bad_samples_above_the_limit_is_refused_with_its_causes(
    tmp_path: Path, write_samples: Write, make_sample: Make
) -> None:
    good, text = make_sample(0), {"txt": b"words"}
    entries = [{**good, "__key__": f"g{n}"} if n % 4 else {"__key__": f"b{n}", **text} for n in range(100)]
    shard = write_samples(tmp_path / "s.tar", entries)
    index_shards([shard], workers=1)
    assert len(load_index([shard], max_bad_fraction=0.25)) == 100
    with pytest.raises(InputError, match="25 of 100 samples can't be used: no_media 25 .data.max_bad_fraction is 0.2"):
        load_index([shard], max_bad_fraction=0.2)


def test_globs_and_braces_name_shards(corpus: list[str]) -> None:
    folder = Path(corpus[0]).parent
    assert expand([f"{folder}/train-*.tar"]) == corpus
    assert expand([f"{folder}/train-{{000000..000001}}.tar"]) == corpus[:2]
    assert expand([corpus[2], corpus[0]]) == [corpus[2], corpus[0]]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{folder}/none-*.tar", "no shard at"),
        ("{folder}/train-{{000000..000009}}.tar", "train-000003.tar"),
        ("{folder}", "no shard at"),
        ("pipe:echo hello", "commands in shard names are not run"),
    ],
)
def test_patterns_that_name_nothing_are_refused(corpus: list[str], pattern: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        expand([pattern.format(folder=Path(corpus[0]).parent)])


def test_a_shard_named_twice_is_refused(corpus: list[str]) -> None:
    with pytest.raises(InputError, match="named twice; use `repeat`"):
        expand([corpus[0], str(Path(corpus[0]).parent / "train-*.tar")])


def test_an_index_costs_few_bytes_and_names_its_version(corpus: list[str]) -> None:
    import pyarrow.parquet as pq

    metadata = pq.read_schema(index_path(corpus[0])).metadata
    assert metadata[b"sora_train.version"] == b"4"
    assert metadata[b"sora_train.shard"].startswith(f"{Path(corpus[0]).stat().st_size}|".encode())
    assert json.loads(metadata[b"sora_train.limits"]) == list(Limits())
    assert np.array_equal(load_index(corpus[:1]).frames, load_index(corpus).frames[:8])
