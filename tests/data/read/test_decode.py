"""Every back end gives the frame that a viewer would see then, upright; what one can't do the next one does."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from sora_train.data.read import back_ends
from sora_train.data.read.back_ends import Options, decode, load_error
from sora_train.data.read.decode import DecodeError, Limits, Track, container, shown_at
from sora_train.data.read.probe import _beginning, probe, rate
from tests.data.videos import HEIGHT, WIDTH, cut, number_of, turned, write_video

STEADY = [k / 30 for k in range(60)]
BURSTS = np.cumsum([0.0] + [1 / 30 if k // 10 % 2 else 1 / 10 for k in range(59)]).tolist()
BACK_ENDS = ("decord", "pyav")
EACH = [
    *BACK_ENDS,
    pytest.param("torchcodec", marks=pytest.mark.skipif(bool(load_error("torchcodec")), reason="it doesn't load here")),
]


def track(data: bytes, extension: str = "mp4") -> Track:
    said = probe(data, extension, Limits())
    assert probe(data, extension, Limits(), pixels=False) == said, "the header alone says the same as the picture"
    return Track.of(said)


def numbers(data: bytes, frames: list[int], back_end: str, extension: str = "mp4") -> list[int]:
    pictures = decode(data, extension, frames, (HEIGHT, WIDTH), track(data, extension), Options((back_end,)))
    return [number_of(picture) for picture in pictures]


@pytest.fixture(scope="module")
def steady(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_video(tmp_path_factory.mktemp("v") / "steady.mp4", STEADY)


@pytest.mark.parametrize("back_end", EACH)
def test_a_steady_video_gives_frame_k_for_number_k(steady: bytes, back_end: str) -> None:
    frames = [0, 1, 5, 11, 12, 13, 40, 59]
    assert track(steady) == Track(30.0, stream=0, frames=60)
    assert numbers(steady, frames, back_end) == frames


def test_back_ends_agree_on_the_pixels(steady: bytes) -> None:
    ours, theirs = (decode(steady, "mp4", [0, 20, 59], (HEIGHT, WIDTH), options=Options((b,))) for b in BACK_ENDS)
    assert np.abs(ours.astype(int) - theirs).max() <= 2
    small, other = (decode(steady, "mp4", [0, 20, 59], (48, 64), options=Options((b,))) for b in BACK_ENDS)
    assert small.shape == other.shape == (3, 48, 64, 3)
    assert np.abs(small.astype(int) - other).mean() < 2


@pytest.mark.parametrize("back_end", EACH)
@pytest.mark.parametrize("name", ["bursts.mp4", "bursts.mkv"])
def test_a_variable_rate_gives_the_frame_on_the_screen_at_that_time(tmp_path: Path, name: str, back_end: str) -> None:
    data = write_video(tmp_path / name, BURSTS)
    said = probe(data, name[-3:], Limits())
    assert said["vfr"] and said["frames"] == 60
    assert abs(said["duration"] - BURSTS[-1]) < 0.15
    wanted = list(range(0, 60, 7))
    middle = (np.array(wanted) + 0.5) / said["fps"]
    seen = [int(np.searchsorted(BURSTS, t, side="right")) - 1 for t in middle]
    assert seen != wanted, "so that plain counting would be wrong"
    assert numbers(data, wanted, back_end, name[-3:]) == seen


def test_frames_that_an_edit_list_hides_are_neither_counted_nor_shown(tmp_path: Path) -> None:
    whole = write_video(tmp_path / "whole.mp4", STEADY, gop=30)
    data = cut(whole, tmp_path / "cut.mp4", 0.7)
    said = probe(data, "mp4", Limits())
    assert (said["frames"], said["careful"]) == (39, True)
    assert numbers(data, [0, 1, 20, 38], "pyav") == [21, 22, 41, 59]
    with pytest.raises(DecodeError, match="PyAV alone"):
        numbers(data, [0], "decord")
    both = decode(data, "mp4", [0, 38], (HEIGHT, WIDTH), track(data), Options(BACK_ENDS))
    assert [number_of(picture) for picture in both] == [21, 59]


@pytest.mark.parametrize("back_end", EACH)
@pytest.mark.parametrize(("degrees", "quarters"), [(90, 3), (180, 2), (270, 1)])
def test_turned_videos_come_upright(steady: bytes, degrees: int, quarters: int, back_end: str) -> None:
    data = turned(steady, degrees)
    said = probe(data, "mp4", Limits())
    size = (HEIGHT, WIDTH) if degrees == 180 else (WIDTH, HEIGHT)
    assert (said["height"], said["width"], said["rotation"]) == (*size, quarters * 90)
    flat = decode(steady, "mp4", [37], (HEIGHT, WIDTH), options=Options((back_end,)))[0]
    upright = decode(data, "mp4", [37], size, track(data), Options((back_end,)))[0]
    assert np.abs(np.rot90(flat, quarters).astype(int) - upright).mean() < 3


@pytest.mark.parametrize(
    ("name", "codec", "pixel_format", "size"),
    [
        ("hevc.mp4", "libx265", "yuv420p", (96, 128)),
        ("vp9.webm", "libvpx-vp9", "yuv420p", (96, 128)),
        ("mpeg4.avi", "mpeg4", "yuv420p", (96, 128)),
        ("full.mp4", "libx264", "yuv444p", (95, 127)),
        ("ten.mp4", "libx264", "yuv420p10le", (96, 128)),
    ],
)
def test_codecs_and_pixel_formats_come_as_rgb(
    tmp_path: Path, name: str, codec: str, pixel_format: str, size: tuple[int, int]
) -> None:
    options = {"x265-params": "log-level=error"} if codec == "libx265" else {}
    data = write_video(tmp_path / name, STEADY[:30], codec, pixel_format, 12, size, options)
    extension = name.rpartition(".")[2]
    said = probe(data, extension, Limits())
    assert (said["frames"], said["height"], said["width"]) == (30, *size)
    assert said["pixel_format"] == pixel_format
    for back_end in BACK_ENDS[said["careful"] :]:
        pictures = decode(data, extension, [0, 13, 29], size, track(data, extension), Options((back_end,)))
        assert [number_of(picture) for picture in pictures] == [0, 13, 29], back_end


def test_a_packet_is_cut_behind_the_header_of_its_first_slice() -> None:
    def unit(first: int, size: int, lengths: int = 4) -> bytes:
        return size.to_bytes(lengths, "big") + bytes([first]) + bytes(size - 1)

    h264 = SimpleNamespace(name="h264", extradata=bytes([1, 100, 0, 30, 0xFF]))
    extra, idr = unit(6, 40), unit(0x65, 9000)
    assert _beginning(extra + idr + unit(0x41, 700), h264) == extra + (128).to_bytes(4, "big") + idr[4:132]
    assert _beginning(extra, h264) == extra and _beginning(b"", h264) == b""
    short = SimpleNamespace(name="h264", extradata=bytes([1, 100, 0, 30, 0xFD]))
    assert len(_beginning(unit(0x65, 900, 2), short)) == 2 + 128
    hevc = SimpleNamespace(name="hevc", extradata=bytes([1, *bytes(20), 0xFF]))
    assert len(_beginning(unit(0x4E, 40) + unit(0x26, 9000), hevc)) == 44 + 4 + 128
    start_codes = SimpleNamespace(name="h264", extradata=b"\0\0\0\1g")
    assert _beginning(idr, start_codes) == idr and _beginning(idr, SimpleNamespace(name="vp9", extradata=None)) == idr


def test_without_pixels_the_decoder_gets_a_few_bytes_of_one_packet(
    steady: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[int] = []

    def noted(packet: bytes, codec: object) -> bytes:
        lengths.append(len(_beginning(packet, codec)))
        return _beginning(packet, codec)

    monkeypatch.setattr("sora_train.data.read.probe._beginning", noted)
    assert probe(steady, "mp4", Limits(), pixels=False)["frames"] == 60
    assert len(lengths) == 1 and lengths[0] < 1000  # x264's note of its settings, and the slice's header


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "PNG"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_an_image_on_its_side_has_its_upright_size_with_and_without_pixels(kind: str, orientation: int) -> None:
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    Image.new("RGB", (40, 24)).save(buffer, kind, exif=exif)
    said = [probe(buffer.getvalue(), "jpg", Limits(), pixels) for pixels in (True, False)]
    assert said[0] == said[1]
    assert (said[0]["width"], said[0]["height"]) == ((24, 40) if orientation > 4 else (40, 24))


def test_open_groups_of_pictures_are_left_to_a_back_end_that_seeks_by_time(tmp_path: Path) -> None:
    data = write_video(tmp_path / "open.mp4", STEADY, codec_options={"x264-params": "open-gop=1:bframes=3:b-adapt=0"})
    assert track(data).careful
    assert numbers(data, [13, 22, 23, 24, 47], "pyav") == [13, 22, 23, 24, 47]


def test_what_one_back_end_cannot_do_the_next_one_does(steady: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> np.ndarray:
        raise RuntimeError("no luck\nwith this one")

    monkeypatch.setitem(back_ends.BACK_ENDS, "decord", broken)
    assert numbers(steady, [7], "pyav") == [number_of(decode(steady, "mp4", [7], (HEIGHT, WIDTH))[0])]
    monkeypatch.setitem(back_ends.BACK_ENDS, "pyav", broken)
    with pytest.raises(DecodeError, match="decord: RuntimeError: no luck; pyav: RuntimeError: no luck") as caught:
        decode(steady, "mp4", [7], (HEIGHT, WIDTH))
    assert caught.value.cause == "undecodable"


def test_too_short_is_its_own_cause_when_all_back_ends_say_so(steady: bytes) -> None:
    with pytest.raises(DecodeError) as caught:
        decode(steady, "mp4", [0, 60], (HEIGHT, WIDTH))
    assert caught.value.cause == "short"


@pytest.mark.parametrize(
    ("limits", "cause"),
    [(Limits(pixels=96 * 128 - 1), "pixels"), (Limits(frames=59), "frames"), (Limits(bytes=1000), "bytes")],
)
def test_limits_hold_before_anything_is_decoded(
    steady: bytes, limits: Limits, cause: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sora_train.data.read.probe._first", lambda *_: pytest.fail("a frame was decoded"))
    with pytest.raises(DecodeError, match="data.limits") as caught:
        probe(steady, "mp4", limits)
    assert caught.value.cause == cause


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"\0\0\0\x20ftypisom", "mov"),
        (b"\x1aE\xdf\xa3....", "matroska"),
        (b"RIFF....AVI LIST", "avi"),
        (b"RIFF....WAVEfmt ", None),
        (b"#EXTM3U\nhttp://x/a.ts", None),
        (b"ffconcat version 1.0\nfile /etc/passwd", None),
        (b"<?xml version='1.0'?><MPD>", None),
        (b"v=0\no=- 0 0 IN IP4 127.0.0.1", None),
        (b"", None),
        (b"\xff" * 50 + (b"G" + bytes(187)) * 6, "mpegts"),
        ((bytes(4) + b"G" + bytes(187)) * 4, "mpegts"),
        ((b"G" + bytes(187)) * 2, None),
        (bytes(range(256)) * 4, None),
    ],
)
def test_containers_are_known_by_their_first_bytes(data: bytes, kind: str | None) -> None:
    assert container(data) == kind


def test_the_frame_shown_is_the_last_that_began() -> None:
    times = np.array([5.0, 5.1, 5.2, 6.0, 6.1])
    assert shown_at(times, [0, 1, 2, 3, 4], 4.0) == [1, 2, 2, 2, 4]


@pytest.mark.parametrize(
    ("times", "claimed", "expected"),
    [
        ([0.0, 0.25, 0.5, 0.75], 4.0, (4.0, 1.0, False)),
        ([0.0, 0.26, 0.49, 0.75], 4.0, (4.0, 1.0, False)),  # jitter below half a frame
        ([0.0, 0.25, 0.5, 0.75], 30.0, (4.0, 1.0, False)),  # the claim is wrong, the rate is constant
        ([0.0, 0.1, 0.2, 2.9], 1.0, (4 / 3.0, 3.0, True)),
        ([3.5], 25.0, (25.0, 0.04, False)),
    ],
)
def test_the_rate_comes_from_the_presentation_times(
    times: list[float], claimed: float, expected: tuple[float, float, bool]
) -> None:
    fps, duration, vfr = rate(np.array(times), claimed)
    assert (pytest.approx(fps), pytest.approx(duration), vfr) == expected


@pytest.mark.parametrize("times", [[0.0, 0.0, 0.0], [0.0, 1e-9, 2e-9], [0.0, 1e9]])
def test_impossible_time_lines_are_refused(times: list[float]) -> None:
    with pytest.raises(DecodeError, match="timeline"):
        rate(np.array(times), 0.0)


def test_a_back_end_that_is_not_there_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(back_ends._MODULES, "decord", "no_such_library")
    assert "no_such_library" in load_error("decord")
    assert load_error("pyav") == ""


def test_libraries_that_are_not_there_are_named_in_one_short_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torchcodec says it: pages, with a traceback for each version of FFmpeg."""
    tried = "\n".join(f"  OSError: libavutil.so.{n}: cannot open shared object file: No file" for n in (60, 59, 59))

    def fail(name: str) -> None:
        raise RuntimeError(f"Could not load libtorchcodec. Likely causes:\n  1. FFmpeg\n{tried}\n")

    monkeypatch.setattr("importlib.import_module", fail)
    assert load_error("torchcodec") == (
        "torchcodec finds none of libavutil.so.60, libavutil.so.59; install FFmpeg's shared libraries"
    )


def test_a_title_in_another_encoding_is_no_damage(steady: bytes) -> None:
    """Whatever bytes stand in a video's metadata: it is not looked at, and PyAV would refuse the file for it."""
    at = steady.index(b"Lavf")  # the name of the program that wrote it
    data = steady[:at] + b"\xb1\xe9\xff\xfe" + steady[at + 4 :]
    assert probe(data, "mp4", Limits())["frames"] == 60
    assert numbers(data, [0, 41], "pyav") == [0, 41]
