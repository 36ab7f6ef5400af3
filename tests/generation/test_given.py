"""Images and videos that a user gives: upright, at their times, by data.fit, in bounded memory, or refused."""

from __future__ import annotations

import io
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sora_train.config.schema import Fit
from sora_train.core.cli import InputError
from sora_train.core.media import write_gif, write_mp4
from sora_train.data.read.pool import Pool
from sora_train.generation.given import Given, fitted


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool(1) as made:
        yield made


def levels(given: Given, size: tuple[int, int] = (32, 32)) -> list[int]:
    """The brightness of every frame, in twentieths."""
    return np.rint(given.decoded(0, given.frames, size).mean(axis=(1, 2, 3)) / 20).astype(int).tolist()


def counted(count: int) -> np.ndarray:
    """Frames that are brighter by 20 from one to the next."""
    ramp = np.arange(count, dtype=np.uint8)[:, None, None, None] * 20
    return np.broadcast_to(ramp, (count, 48, 48, 3)).copy()


@pytest.mark.parametrize("rate", [2.0, 4.0, 6.0, 8.0, 10.0])
def test_a_video_runs_at_its_own_speed(pool: Pool, tmp_path: Path, rate: float) -> None:
    """At 4 frames a second, frame n is what the file shows at n / 4 seconds, within one of its own frames."""
    write_mp4(tmp_path / "a.mp4", counted(12), rate, crf=1)
    shown = levels(Given(str(tmp_path / "a.mp4"), 4.0, Fit.crop, pool))
    assert len(shown) == pytest.approx(12 / rate * 4, abs=1)
    assert all(abs(number - n / 4 * rate) <= 1 for n, number in enumerate(shown)) and shown[0] == 0


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
@pytest.mark.parametrize("durations", [[250] * 4, [500, 250, 500]])
def test_an_animation_runs_at_its_own_times(pool: Pool, tmp_path: Path, kind: str, durations: list[int]) -> None:
    """From the middle of an average frame on, each frame of the clip is on the screen within a tenth of a second."""
    pictures = [Image.fromarray(frame) for frame in counted(len(durations))]
    path = tmp_path / "named.mp4"  # a name isn't believed
    pictures[0].save(path, kind, save_all=True, append_images=pictures[1:], duration=durations, loop=0, lossless=True)
    ends = np.cumsum(durations) / 1000
    shown = levels(Given(str(path), 4.0, Fit.crop, pool))
    assert len(shown) == pytest.approx(ends[-1] * 4, abs=0.5)
    for n, number in enumerate(shown):
        at = ends[-1] / len(durations) / 2 + n / 4
        assert ends[number] - durations[number] / 1000 - 0.1 <= at <= ends[number] + 0.1, (n, shown)


def test_the_picture_in_place_of_an_animated_png_is_no_frame_of_it(pool: Pool, tmp_path: Path) -> None:
    pictures = [Image.fromarray(frame) for frame in counted(4)]
    pictures[3].save(tmp_path / "a.png", save_all=True, append_images=pictures[:3], duration=250, default_image=True)
    given = Given(str(tmp_path / "a.png"), 4.0, Fit.crop, pool)
    assert given.frames == 3 and levels(given) == [0, 1, 2]


def test_a_gif_of_ours_comes_back(pool: Pool, tmp_path: Path) -> None:
    write_gif(tmp_path / "a.gif", counted(9), 8.0)
    given = Given(str(tmp_path / "a.gif"), 8.0, Fit.crop, pool)
    assert given.frames == 9 and levels(given) == list(range(9))


def test_one_frame_of_gif_is_an_image_and_what_is_transparent_is_white(pool: Pool, tmp_path: Path) -> None:
    picture = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    picture.save(tmp_path / "a.gif")
    given = Given(str(tmp_path / "a.gif"), 8.0, Fit.crop, pool)
    assert given.frames == 1 and given.decoded(0, 1, (32, 32)).min() == 255


def test_images_with_more_than_eight_bits_and_hidden_colours_are_shown_as_in_training(
    pool: Pool, tmp_path: Path
) -> None:
    ramp = np.linspace(0, 65535, 32, dtype=np.uint16)[None].repeat(32, 0)
    Image.fromarray(ramp).save(tmp_path / "grey.png")  # 16 bits of grey
    shown = Given(str(tmp_path / "grey.png"), 8.0, Fit.crop, pool).decoded(0, 1, (32, 32))[0]
    assert np.abs(shown[16, :, 0] - ramp[0] / 257).max() <= 1 and (shown == shown[..., :1]).all()
    for mode, hidden in (("RGBA", (200, 0, 0, 0)), ("LA", (0, 0)), ("PA", None)):
        picture = Image.new("RGBA", (32, 32), (200, 0, 0, 0)) if hidden is None else Image.new(mode, (32, 32), hidden)
        picture.paste((0, 0, 255, 255) if picture.mode == "RGBA" else (0, 255), (0, 0, 16, 32))
        picture = picture.quantize() if hidden is None else picture
        picture.save(tmp_path / f"{mode}.png")
        left, right = np.split(
            Given(str(tmp_path / f"{mode}.png"), 8.0, Fit.crop, pool).decoded(0, 1, (32, 32))[0], 2, 1
        )
        assert left[:, :14, :2].max() == 0 and right[:, 2:].min() == 255, mode


def test_a_photo_is_upright(pool: Pool, tmp_path: Path) -> None:
    """EXIF orientation 6: what is stored at the left is shown at the top."""
    picture = Image.new("RGB", (64, 32), "black")
    picture.paste("red", (0, 0, 32, 32))
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(tmp_path / "a.jpg", exif=exif, quality=95)
    given = Given(str(tmp_path / "a.jpg"), 8.0, Fit.crop, pool)
    shown = given.decoded(0, 1, (64, 32))[0]
    assert (given.height, given.width) == (64, 32)
    assert shown[:24].mean(axis=(0, 1)).round().tolist()[0] > 240 and shown[40:].max() < 40


def test_fit_says_how_another_aspect_comes_to_the_size() -> None:
    assert fitted((32, 64), (48, 48), Fit.crop) == ((48, 96), (0, 24, 48, 48))
    assert fitted((64, 32), (48, 48), Fit.crop) == ((96, 48), (24, 0, 48, 48))
    assert fitted((32, 64), (48, 48), Fit.stretch) == ((48, 48), (0, 0, 48, 48))


def test_an_image_of_another_aspect_is_cut_not_squashed(pool: Pool, tmp_path: Path) -> None:
    picture = Image.new("RGB", (96, 48), "blue")
    picture.paste("white", (24, 0, 72, 48))
    picture.save(tmp_path / "a.png")
    assert Given(str(tmp_path / "a.png"), 8.0, Fit.crop, pool).decoded(0, 1, (48, 48))[0, :, 2:-2].min() > 250
    assert Given(str(tmp_path / "a.png"), 8.0, Fit.stretch, pool).decoded(0, 1, (48, 48))[0, :, 2:10].min() < 5


def jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 80).convert("RGB").save(buffer, "JPEG")
    return buffer.getvalue()


BAD = {
    "none.png": (None, "there is no file"), "empty.png": (b"", "empty: no bytes"),
    "html.png": (b"<html>not found</html>", "can't be used"), "cut.jpg": (jpeg()[:400], "can't be used"),
    "cut.gif": (b"GIF89a\x10", "can't be used"), "list.mp4": (b"#EXTM3U\nfile:///etc/passwd\n", "can't be used"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_image_or_video_is_refused_in_a_line(pool: Pool, tmp_path: Path, name: str) -> None:
    data, message = BAD[name]
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=message) as refused:
        Given(str(tmp_path / name), 8.0, Fit.crop, pool).decoded(0, 1, (32, 32))
    assert "\n" not in str(refused.value) and name in str(refused.value)


def test_what_is_too_large_or_too_long_and_thin_is_refused(pool: Pool, tmp_path: Path) -> None:
    Image.new("1", (8000, 8000)).save(tmp_path / "large.png")
    with pytest.raises(InputError, match="large.png can't be used: pixels"):
        Given(str(tmp_path / "large.png"), 8.0, Fit.crop, pool)
    Image.new("RGB", (30_000, 1)).save(tmp_path / "thin.png")
    with pytest.raises(InputError, match="too long and thin"):
        Given(str(tmp_path / "thin.png"), 8.0, Fit.crop, pool).decoded(0, 1, (256, 256))


MEASURED = """
import resource, sys
from sora_train.config.schema import Fit
from sora_train.data.read.pool import Pool
from sora_train.generation.given import Given
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with Pool(1) as pool:
    given = Given(sys.argv[1], 16.0, Fit.crop, pool)
    count = sum(len(piece) for piece in given.pieces(0, given.frames, (48, 80)))
print(count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.campaign
def test_the_length_and_resolution_of_a_video_do_not_show_in_memory(tmp_path: Path) -> None:
    """Ten seconds of 720p are 442 MiB of pixels; at the size asked for they are 2 MiB."""
    picture = np.random.default_rng(0).integers(0, 255, (1, 45, 80, 3), dtype=np.uint8).repeat(16, 1).repeat(16, 2)
    write_mp4(tmp_path / "hd.mp4", (picture for _ in range(160)), 16.0)
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(tmp_path / "hd.mp4")], capture_output=True, text=True, check=True
    )
    count, grown = map(int, done.stdout.split())
    assert count == 160 and grown * resource.getpagesize() // 4096 < 48 << 10, f"{grown} KiB"
