"""What the tables of an mp4 say of its frames is what FFmpeg says of its packets, or nothing."""

from __future__ import annotations

import io
import random
from pathlib import Path

import av
import numpy as np
import pytest

from sora_train.data.read import probe as probing
from sora_train.data.read.decode import DecodeError, Limits
from sora_train.data.read.mp4_tables import frame_times
from sora_train.data.read.packets import choose_stream, read_line, read_packets, times_of
from sora_train.data.read.probe import _line, _opened
from tests.data.videos import cut, turned, write_video

STEADY = [k / 30 for k in range(60)]
BURSTS = np.cumsum([0.0] + [1 / 30 if k // 10 % 2 else 1 / 10 for k in range(59)]).tolist()
X265 = {"x265-params": "log-level=none"}


def both(data: bytes) -> tuple[tuple[np.ndarray, bool], tuple[np.ndarray, bool]]:
    """Seconds and `careful` as the probe has them, and as FFmpeg's packets have them."""
    with _opened(data) as file:
        stream = choose_stream(file)
        base = float(stream.time_base)
        lines = [_line(data, file, stream, Limits())[0]]
        file.seek(0)
        lines.append(read_line(file, stream, read_packets(file, stream)))
        ours, theirs = ((times_of(line, int(line.shown.sum()), base), line.careful) for line in lines)
        return ours, theirs


def assert_alike(data: bytes) -> None:
    (ours, our_careful), (theirs, careful) = both(data)
    assert len(ours) == len(theirs) and our_careful == careful
    assert np.abs((ours - ours[0]) - (theirs - theirs[0])).max() < 1e-9


@pytest.mark.parametrize(
    ("times", "how"),
    [
        (STEADY, {}),
        (BURSTS, {}),
        (STEADY, {"gop": 250}),
        (STEADY, {"codec_options": {"bf": "0"}}),
        (STEADY, {"codec_options": {"bf": "3", "b-pyramid": "normal"}}),
        (STEADY, {"codec": "libx265", "codec_options": X265}),
        (STEADY, {"codec": "mpeg4"}),
        (STEADY[:1], {}),
    ],
)
def test_tables_and_packets_agree(tmp_path: Path, times: list[float], how: dict) -> None:
    data = write_video(tmp_path / "v.mp4", times, **how)
    assert frame_times(data, 1000) is not None
    assert_alike(data)
    assert_alike(write_video(tmp_path / "v.mov", times, **how))


def test_what_leaves_something_to_interpret_is_left_to_ffmpeg(tmp_path: Path) -> None:
    steady = write_video(tmp_path / "v.mp4", STEADY)
    fragmented = io.BytesIO()
    with (
        av.open(io.BytesIO(steady)) as source,
        av.open(fragmented, "w", format="mp4", options={"movflags": "frag_keyframe+empty_moov"}) as out,
    ):
        given = source.streams.video[0]
        copy = out.add_stream_from_template(given)
        for packet in source.demux(given):
            if packet.dts is not None:
                packet.stream = copy
                out.mux(packet)
    for data in (
        cut(steady, tmp_path / "cut.mp4", 0.7),
        fragmented.getvalue(),
        steady[: len(steady) // 2],
        b"",
        b"\0" * 50,
    ):
        assert frame_times(data, 1000) is None
    assert frame_times(steady, 59) is None, "more frames than may be"
    assert_alike(fragmented.getvalue())
    assert_alike(cut(steady, tmp_path / "cut.mp4", 0.7))
    assert_alike(turned(steady, 90))


def test_damaged_tables_say_what_ffmpeg_says_or_nothing(tmp_path: Path) -> None:
    whole = write_video(tmp_path / "v.mp4", BURSTS)
    at = whole.index(b"moov")
    rng, read = random.Random(0), 0
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 1, 3))):
            data[rng.randrange(at, len(data))] ^= 1 << rng.randrange(8)
        try:
            (ours, our_careful), (theirs, careful) = both(bytes(data))
        except (av.error.FFmpegError, DecodeError, AttributeError):  # the last: without a codec that is known
            continue
        read += frame_times(bytes(data), 1000) is not None
        assert our_careful >= careful, "more careful than need be costs time alone"
        assert len(ours) == len(theirs)
        assert np.abs((ours - ours[0]) - (theirs - theirs[0])).max() < 1e-6
    assert read > 100, "the damage is not always in what is read here"


def test_packets_are_read_where_tables_and_ffmpeg_count_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_video(tmp_path / "v.mp4", STEADY)
    true = frame_times(data, 1000)
    assert true is not None
    monkeypatch.setattr(
        probing, "frame_times", lambda *_: true._replace(ticks=true.ticks[:-1], is_key=true.is_key[:-1])
    )
    with _opened(data) as file:
        line, packets = _line(data, file, choose_stream(file), Limits())
        assert line.shown.sum() == len(packets) == 60
