"""A frame asked for alone is the frame of a decode from the start, or is refused; damage is not trained on."""

from __future__ import annotations

import io
import random
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest

from sora_train.config.schema import Probe
from sora_train.data.read.bitstream import is_entry, is_intact, is_shown, needs_first_packet
from sora_train.data.read.by_pyav import Complaints
from sora_train.data.read.decode import LIMITS, DecodeError, Track
from sora_train.data.read.pool import Pool
from sora_train.data.read.probe import probe
from tests.data import damaged_clips, random_clips
from tests.data.random_clips import decode_all
from tests.data.videos import HEIGHT, WIDTH, hiding, number_of, write_video

STEADY = [k / 30 for k in range(60)]
SIZE = (HEIGHT, WIDTH)


def said_of(path: Path, pool: Pool) -> Track:
    figures = [pool.probe(str(path), path.suffix[1:], pixels=pixels).result() for pixels in (True, False)]
    assert figures[0] == figures[1]
    return Track.of(figures[0])


def alone(path: Path, pool: Pool, track: Track, first: int, count: int = 3) -> list[int]:
    wanted = list(range(first, first + count))
    place = (str(path), path.suffix[1:], (0, -1, None))
    return list(map(number_of, pool.decode(*place, wanted, SIZE, (0, 0, *SIZE), track=track).result()))


@pytest.fixture(scope="module")
def pool() -> Pool:  # type: ignore[misc]
    with Pool(1) as pool:
        yield pool


@pytest.mark.parametrize(
    ("name", "how", "sequential"),
    [
        ("avi_reordered.avi", {"codec_options": {"bf": "3"}}, True),
        ("xvid_reordered.avi", {"codec": "mpeg4", "codec_options": {"bf": "2"}}, True),
        ("intra_refresh.mp4", {"codec_options": {"x264-params": "intra-refresh=1:bframes=0"}}, False),
        ("open_groups.mp4", {"codec_options": {"x264-params": "open-gop=1:bframes=3:b-adapt=0"}}, False),
        ("mjpeg.avi", {"codec": "mjpeg", "pixel_format": "yuvj420p"}, False),
    ],
)  # fmt: skip
def test_what_may_not_be_sought_is_not(
    tmp_path: Path, pool: Pool, name: str, how: dict[str, object], sequential: bool
) -> None:
    path = tmp_path / name
    data = write_video(path, STEADY, **how)  # type: ignore[arg-type]
    track = said_of(path, pool)
    assert track.careful and track.sequential == sequential and track.frames == 60
    assert decode_all(data, track, *SIZE).numbers == list(range(60))
    for first in (0, 13, 31, 50):
        assert alone(path, pool, track, first) == [first, first + 1, first + 2]


@pytest.mark.parametrize("extension", ["webm", "mkv"])
def test_pictures_that_are_never_shown_are_not_counted(tmp_path: Path, pool: Pool, extension: str) -> None:
    hidden = {5, 13, 14, 22, 31, 40, 49, 50, 58}
    shown = [number for number in range(60) if number not in hidden]
    path = tmp_path / f"hidden.{extension}"
    source = write_video(tmp_path / f"source.{extension}", STEADY, codec="libvpx", gop=24)
    data = hiding(source, path, hidden)
    track = said_of(path, pool)
    assert track.careful and not track.sequential and not track.vfr and track.frames == len(shown)
    assert decode_all(data, track, *SIZE).numbers == shown
    for first in range(0, len(shown) - 2):
        assert alone(path, pool, track, first) == shown[first : first + 3]


def test_an_mp4_without_a_table_of_key_frames(tmp_path: Path, pool: Pool) -> None:
    path = tmp_path / "v.mp4"
    path.write_bytes(write_video(path, STEADY, codec_options={"bf": "0"}).replace(b"stss", b"free"))
    track = said_of(path, pool)
    assert track.careful and not track.sequential, "keys are told by the pictures themselves"
    assert [alone(path, pool, track, first, 1) for first in (5, 25, 59)] == [[5], [25], [59]]


def test_a_file_that_was_cut_ends_before_the_first_missing_frame(tmp_path: Path, pool: Pool) -> None:
    frames = damaged_clips.footage(np.random.default_rng(1))
    whole = damaged_clips.clean("libx264", {"preset": "veryfast"}, 12, "mp4", frames, tmp_path)
    path = tmp_path / "v.mp4"
    path.write_bytes(whole[: len(whole) * 6 // 10])  # the index of the file is in front
    track = said_of(path, pool)
    assert track.fps == 24.0 and not track.vfr and 10 < track.frames < len(frames) - 5
    assert Track.of(pool.probe(str(path), "mp4", whole=True).result()) == track, "what was cut off is no damage"
    size = frames.shape[1:3]
    last = track.frames - 1
    got = pool.decode(str(path), "mp4", (0, -1, None), [last], size, (0, 0, *size), track=track).result()
    assert damaged_clips.difference(got, frames[[last]]) < 20


def test_a_matroska_file_without_a_key_packet_is_named(tmp_path: Path, pool: Pool) -> None:
    frames, path = damaged_clips.footage(np.random.default_rng(1))[:6], tmp_path / "a.mkv"
    options = {"preset": "veryfast", "x264-params": "bframes=0"}
    whole = damaged_clips.clean("libx264", options, 99, "mp4", frames, tmp_path)
    with av.open(io.BytesIO(whole)) as given, av.open(str(path), "w") as out:
        stream = given.streams.video[0]
        copy = out.add_stream_from_template(stream)
        for packet in list(given.demux(stream))[1:]:
            if packet.size:
                packet.stream = copy
                out.mux(packet)
    with pytest.raises(DecodeError, match="undecodable: no frame in it that decoding may begin at"):
        pool.probe(str(path), "mkv").result()


def test_entries_are_told_from_key_packets() -> None:
    avcc = bytes([1, 100, 0, 30, 0xFF])

    def packet(*units: bytes) -> bytes:
        return b"".join(len(unit).to_bytes(4, "big") + unit for unit in units)

    at_once, later = b"\x06\x06\x01\x84\x80", b"\x06\x06\x01\x34\x80"  # recovery points: 0 frames, 5
    assert is_entry("h264", packet(b"\x67sps", b"\x65idr"), avcc)
    assert is_entry("h264", packet(at_once, b"\x41i"), avcc) and not is_entry("h264", packet(later, b"\x41i"), avcc)
    assert not is_entry("h264", packet(b"\x41p"), avcc) and not is_entry("h264", b"", avcc)
    assert is_entry("h264", b"\0\0\0\1\x67sps\0\0\1\x65idr", b"\0\0\0\1\x67")
    hvcc = bytes([1, *bytes(20), 0xFF])
    assert is_entry("hevc", packet(b"\x2a\x01cra"), hvcc) and not is_entry("hevc", packet(b"\x02\x01trail"), hvcc)
    assert is_entry("vp9", b"\x82", b"") and not is_entry("vp9", b"\x86", b"") and not is_entry("vp9", b"\x88", b"")
    assert is_entry("vp8", b"\x10", b"") and not is_entry("vp8", b"\x11", b"")
    assert is_shown("vp8", b"\x11") and not is_shown("vp8", b"\x01") and is_shown("h264", b"\x01")
    assert is_entry("mpeg4", b"\0\0\1\xb6\x10", b"") and not is_entry("mpeg4", b"\0\0\1\xb6\x50", b"")
    assert is_entry("prores", b"anything", b"")


def test_damage_that_ffmpeg_takes_for_the_end_of_a_unit_is_seen_in_the_packets() -> None:
    avcc = bytes([1, 100, 0, 30, 0xFF])
    packet = (6).to_bytes(4, "big") + b"\x41slice" + (5).to_bytes(4, "big") + b"\x41more"
    whole = b"head" + packet + b"tail"

    def intact(data: bytes, record: bytes = avcc) -> bool:
        return is_intact("h264", data, 4, 4 + len(packet), record)

    assert intact(whole) and intact(whole.replace(b"slice", b"sli\0\0")), "zeros at the end of a unit are padding"
    assert not intact(whole.replace(b"slice", b"\0\0\0ce")) and not intact(whole.replace(b"\6\x41", b"\7\x41"))
    assert intact(whole.replace(b"slice", b"\0\0\0ce"), b""), "without lengths zeros are part of the start codes"


def test_an_old_x264_has_to_be_heard_first() -> None:
    note = b"....x264 - core 148 r2643"
    assert needs_first_packet("h264", "yuv444p", note)
    assert not needs_first_packet("h264", "yuv420p", note)
    assert not needs_first_packet("h264", "yuv444p", note.replace(b"148", b"164"))
    assert needs_first_packet("h264", "yuv420p", note.replace(b"148", b"30 "))
    assert not needs_first_packet("hevc", "yuv444p", note)


def test_what_a_decoder_conceals_is_refused_and_what_is_whole_comes(tmp_path: Path, pool: Pool) -> None:
    frames = damaged_clips.footage(np.random.default_rng(0))
    data = bytearray(damaged_clips.clean("libx264", {"preset": "veryfast"}, 12, "mp4", frames, tmp_path))
    path = tmp_path / "v.mp4"
    path.write_bytes(data)
    track = said_of(path, pool)
    assert not track.careful and Track.of(pool.probe(str(path), "mp4", whole=True).result()) == track
    size = frames.shape[1:3]

    def ask(first: int) -> np.ndarray:
        wanted = list(range(first, first + 6))
        return pool.decode(str(path), "mp4", (0, -1, None), wanted, size, (0, 0, *size), track=track).result()

    before = [ask(first) for first in (0, 26)]
    start = data.index(b"mdat")
    at = start + (len(data) - start) * 2 // 5
    data[at : at + 200] = bytes(200)
    path.write_bytes(data)
    results = []
    for first in range(0, len(frames) - 5, 6):
        try:
            results.append(ask(first))
        except DecodeError as error:
            assert error.cause == "damaged" and ("h264" in error.detail or "zeros" in error.detail)
            results.append(None)
    assert any(result is None for result in results) and np.array_equal(results[0], before[0])
    assert len([result for result in results if result is not None]) >= 3
    with pytest.raises(DecodeError, match=r"damaged: packet \d+ of 32: ") as refused:
        pool.probe(str(path), "mp4", whole=True).result()
    assert refused.value.cause == "damaged"


def test_random_clips_of_every_kind_have_no_wrong_frame(tmp_path: Path) -> None:
    result = random_clips.campaign(12, 11, tmp_path)
    assert not result.wrong and result.right > 30 and not result.refused


@pytest.mark.campaign
@pytest.mark.timeout(7200)
def test_two_thousand_random_clips(tmp_path: Path) -> None:
    result = random_clips.campaign(2000, 1, tmp_path)
    print(f"\n{result.right} right, {len(result.refused)} refused, {result.careful} by PyAV")
    assert not result.wrong and len(result.refused) < 0.03 * result.right


def test_of_damaged_videos_few_are_trained_on_wrong(tmp_path: Path) -> None:
    log = tmp_path / "log"
    out = damaged_clips.campaign(6, "libx264", 5, tmp_path, log=log)
    became = Counter(one.became for one in out)
    assert len(out) == 6 and not became["wrong"] and became["unusable"] >= 3
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:4]))
    assert damaged_clips.campaign(6, "libx264", 5, tmp_path, log=log) == out  # goes on where it was


def test_bits_left_over_at_the_end_of_a_slice_are_damage(tmp_path: Path, pool: Pool) -> None:
    """FFmpeg looks at them only when told to; of CAVLC they show most of the flips that leave a valid stream."""
    options, frames = {"preset": "veryfast", "x264-params": "cabac=0"}, damaged_clips.footage(np.random.default_rng(21))
    clip, path = damaged_clips.clean("libx264", options, 12, "mp4", frames[:16], tmp_path), tmp_path / "a.mp4"
    path.write_bytes(clip)
    assert pool.probe(str(path), "mp4", whole=True).result()["frames"] == 16
    first = clip.index(b"mdat")
    shown_by_them = 0
    for place in range(first + 900, len(clip), (len(clip) - first) // 40):
        damaged = clip[:place] + bytes([clip[place] ^ 16]) + clip[place + 1 :]
        path.write_bytes(damaged)
        try:
            pool.probe(str(path), "mp4", whole=True).result()
        except DecodeError:
            shown_by_them += not _complains(damaged)
    assert shown_by_them >= 1


def test_bytes_left_over_at_the_end_of_a_slice_are_damage(tmp_path: Path) -> None:
    """Of CABAC FFmpeg reports too few of them, and never too many: flips in the last bytes of slices show it."""
    frames = damaged_clips.footage(np.random.default_rng(21))[:16]
    clip = damaged_clips.clean("libx264", {"preset": "veryfast"}, 12, "mp4", frames, tmp_path)
    assert probe(clip, "mp4", LIMITS, whole=True)["frames"] == 16
    with av.open(io.BytesIO(clip)) as file:
        ends = [packet.pos + packet.size for packet in file.demux(video=0) if packet.size > 160]
    unreported = refused = 0
    for at in [end - back for end in ends for back in (60, 120)]:
        damaged = clip[:at] + bytes([clip[at] ^ 16]) + clip[at + 1 :]
        if not _complains(damaged):
            unreported += 1
            try:
                probe(damaged, "mp4", LIMITS, whole=True)
            except DecodeError as error:
                refused += error.cause == "damaged" and "its picture ends before its bytes do" in error.detail
    assert unreported >= 5 and refused > unreported / 2


@pytest.mark.parametrize("extension", ["mp4", "ts"])
@pytest.mark.parametrize(
    "kind",
    ["letterbox", "still", "b-pyramid=normal", "tff=1", "slices=4", "intra-refresh=1:bframes=0",
     "nal-hrd=cbr:vbv-maxrate=2000:vbv-bufsize=2000:bitrate=2000"],
)  # fmt: skip
def test_whole_slices_leave_no_bytes_over(tmp_path: Path, kind: str, extension: str) -> None:
    frames, options = damaged_clips.footage(np.random.default_rng(3)), {"preset": "veryfast", "crf": "28"}
    if kind == "letterbox":
        frames[:, :40], frames[:, -56:] = 16, 16
    elif kind == "still":
        frames[:] = frames[:1]
    else:
        options["x264-params"] = kind
    clip = damaged_clips.clean("libx264", options, 24, extension, frames, tmp_path)
    assert probe(clip, extension, LIMITS, whole=True)["frames"] == 32


@pytest.mark.parametrize(("pools", "least"), [("1", 5), ("none", 0)])
def test_rows_of_hevc_that_end_where_the_next_does_not_begin_are_damage(tmp_path: Path, pools: str, least: int) -> None:
    """FFmpeg reports none of these flips; where each row has a beginning, two threads show most of them."""
    options = {"preset": "ultrafast", "x265-params": f"log-level=none:pools={pools}:frame-threads=1"}
    frames = damaged_clips.footage(np.random.default_rng(5))[:8]
    clip = damaged_clips.clean("libx265", options, 8, "mp4", frames, tmp_path)
    assert probe(clip, "mp4", LIMITS, whole=True)["frames"] == 8
    said = []
    for at in range(len(clip) // 2 - 800, len(clip) // 2 + 800, 200):
        try:
            probe(clip[:at] + bytes([clip[at] ^ 4]) + clip[at + 1 :], "mp4", LIMITS, whole=True)
        except DecodeError as error:
            said.append(error.detail)
    assert len([one for one in said if "a row of it ends where the next doesn't begin" in one]) >= least
    assert least or not said, "nothing tells of damage there"


def _complains(data: bytes) -> bool:
    """Tell whether FFmpeg reports damage by itself."""
    with Complaints() as complaints, av.open(io.BytesIO(data)) as file:
        try:
            for _ in file.decode(video=0):
                pass
        except av.error.FFmpegError:
            return True
        return bool(complaints.take())


@pytest.mark.campaign
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(
    ("codec", "depth", "share"),
    [
        ("libx264", Probe.all, 0.01), ("libx264", Probe.packets, 0.04),
        ("libx265", Probe.all, 0.5), ("libx265", Probe.packets, 0.5),
    ],
)  # fmt: skip
def test_a_thousand_damaged_videos(tmp_path: Path, codec: str, depth: Probe, share: float) -> None:
    """A flipped bit may leave a valid stream, but few files are damaged in such places alone."""
    out = damaged_clips.campaign(1000, codec, random.Random(codec).randrange(1000), tmp_path, depth)
    print(f"\n{codec}, {depth.value}: {damaged_clips.summary(out)}")
    assert sum(one.became == "wrong" for one in out) <= share * len(out)
