"""Videos and pictures written by `media` are real files, exact in count, rate and place of the index."""

from __future__ import annotations

import io
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from sora_train.core.media import contact_sheet, encode_mp4, read_mp4, write_mp4, write_png


def moving_square(frames: int = 9, height: int = 48, width: int = 64) -> np.ndarray:
    video = np.full((frames, height, width, 3), (55, 75, 220), np.uint8)
    for t in range(frames):
        video[t, 8:24, t + 4 : t + 20] = (215, 45, 45)
    return video


@pytest.mark.parametrize(("frames", "fps"), [(1, 8.0), (2, 24.0), (13, 30000 / 1001), (33, 16.0)])
def test_frame_count_and_rate_are_exact(tmp_path: Path, frames: int, fps: float) -> None:
    video = moving_square(frames)
    write_mp4(tmp_path / "clip.mp4", video, fps)
    back, rate = read_mp4(tmp_path / "clip.mp4")
    assert back.shape == video.shape
    assert rate == pytest.approx(fps, rel=1e-5)


def test_colours_survive() -> None:
    back, _ = read_mp4(encode_mp4(moving_square(), 8, crf=10))
    middle = back[4].astype(int)
    assert np.abs(middle[14, 16] - (215, 45, 45)).max() <= 6
    assert np.abs(middle[40, 50] - (55, 75, 220)).max() <= 6


def test_stream_is_h264_yuv420p_with_the_index_in_front_and_metadata() -> None:
    data = encode_mp4(moving_square(30), 8, gop=12, metadata={"prompt": "a réd square", "seed": "7"})
    assert 0 < data.find(b"moov") < data.find(b"mdat")
    with av.open(io.BytesIO(data), "r") as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert container.metadata["prompt"] == "a réd square"
        assert container.metadata["seed"] == "7"
        keys = [i for i, frame in enumerate(container.decode(stream)) if frame.key_frame]
    assert keys == [0, 12, 24]


def test_odd_sizes_repeat_the_edge() -> None:
    video = moving_square(3, 47, 63)
    back, _ = read_mp4(encode_mp4(video, 8, crf=10))
    assert back.shape == (3, 48, 64, 3)
    assert np.abs(back[:, 47].astype(int) - back[:, 46]).max() <= 12


def test_same_frames_give_the_same_bytes_in_file_and_buffer(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    video, buffer = rng.integers(0, 255, (25, 64, 64, 3), dtype=np.uint8), io.BytesIO()
    write_mp4(tmp_path / "clip.mp4", video, 8)
    write_mp4(buffer, video, 8)
    assert (tmp_path / "clip.mp4").read_bytes() == buffer.getvalue() == encode_mp4(video, 8)
    assert len({encode_mp4(clip, 8) for clip in (video, moving_square()) for _ in range(20)}) == 2


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    write_mp4(tmp_path / "clip.mp4", moving_square(), 8)
    before = (tmp_path / "clip.mp4").read_bytes()
    with pytest.raises(ValueError, match="uint8"):
        write_mp4(tmp_path / "clip.mp4", moving_square().astype(np.float32), 8)
    assert (tmp_path / "clip.mp4").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["clip.mp4"]


@pytest.mark.parametrize("data", [b"", b"not a video at all", encode_mp4(moving_square(), 8)[:200]])
def test_what_is_no_video_raises_value_error(data: bytes) -> None:
    with pytest.raises(ValueError, match="no video"):
        read_mp4(data)


def test_contact_sheet_shows_first_and_last() -> None:
    video = moving_square(17)
    sheet = np.asarray(contact_sheet(video, columns=5))
    assert sheet.shape == (48, 5 * 64, 3)
    assert (sheet[:, :64] == video[0]).all()
    assert (sheet[:, -64:] == video[16]).all()
    assert contact_sheet(video[:2], columns=8, scale=2).size == (2 * 64 * 2, 96)


def test_write_png_keeps_every_pixel(tmp_path: Path) -> None:
    picture = moving_square(1)[0]
    write_png(tmp_path / "a.png", picture)
    write_png(tmp_path / "b.png", Image.fromarray(picture))
    for name in ("a.png", "b.png"):
        assert (np.asarray(Image.open(tmp_path / name)) == picture).all()
    assert len(list(tmp_path.iterdir())) == 2
