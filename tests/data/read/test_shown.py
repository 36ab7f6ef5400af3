"""Pictures come as the ffmpeg program and browsers show them: orientation, shape, transparency, depth, one stream."""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image, ImageCms

from sora_train.config.schema import Fit
from sora_train.data.read.back_ends import Options, decode
from sora_train.data.read.decode import Conversion, Limits, Track, open_image
from sora_train.data.read.orientation import from_matrix, upright
from sora_train.data.read.pool import Pool
from sora_train.data.read.probe import probe
from sora_train.generation.given import Given
from tests.data.videos import HEIGHT, WIDTH, number_of, numbered, write_video

STEADY = [k / 30 for k in range(30)]
ONE = 1 << 16
# rows (a, b), (c, d) of a display matrix: where right and down go
MATRICES = {
    "as it is": ((1, 0, 0, 1), lambda p: p),
    "mirrored left to right": ((-1, 0, 0, 1), lambda p: p[:, ::-1]),
    "mirrored top to bottom": ((1, 0, 0, -1), lambda p: p[::-1]),
    "turned by 180": ((-1, 0, 0, -1), lambda p: p[::-1, ::-1]),
    "clockwise": ((0, 1, -1, 0), lambda p: np.rot90(p, -1)),
    "counter-clockwise": ((0, -1, 1, 0), lambda p: np.rot90(p, 1)),
    "transposed": ((0, 1, 1, 0), lambda p: p.transpose(1, 0, 2)),
    "transposed the other way": ((0, -1, -1, 0), lambda p: np.rot90(p, 2).transpose(1, 0, 2)),
}


def with_matrix(source: bytes, rows: tuple[int, int, int, int]) -> bytes:
    a, b, c, d = (value * ONE for value in rows)
    left, top = WIDTH * ONE * (min(rows[0], rows[2]) < 0), HEIGHT * ONE * (min(rows[1], rows[3]) < 0)
    data = bytearray(source)
    at = data.index(b"tkhd") + 44  # of a version 0 box
    matrix = (a, b, 0, c, d, 0, left, top, 1 << 30)
    data[at : at + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in matrix)
    return bytes(data)


@pytest.mark.parametrize("name", MATRICES)
def test_every_display_matrix(tmp_path: Path, name: str) -> None:
    rows, shown = MATRICES[name]
    source = write_video(tmp_path / "v.mp4", STEADY)
    flat = decode(source, "mp4", [21], (HEIGHT, WIDTH))[0]
    data = with_matrix(source, rows)
    said = probe(data, "mp4", Limits(), pixels=False)
    expected = shown(flat)
    assert (said["height"], said["width"]) == expected.shape[:2]
    got = decode(data, "mp4", [21], expected.shape[:2], Track.of(said))[0]
    assert np.abs(got.astype(int) - expected).mean() < 3


def test_a_matrix_between_two_quarters_is_the_nearer_one_and_nonsense_none() -> None:
    turned = np.array([ONE * 9 // 10, ONE // 3, 0, -ONE // 3, ONE * 9 // 10, 0, 0, 0, 1 << 30], np.int32)
    assert from_matrix(turned.tobytes()) == (0, False)
    assert from_matrix(None) == from_matrix(bytes(36)) == from_matrix(b"short") == (0, False)
    picture = np.arange(24).reshape(2, 4, 3)
    assert upright(picture, 90, True).shape == (4, 2, 3)


@pytest.mark.parametrize(("aspect", "size"), [((4, 3), (96, 171)), ((3, 4), (128, 128)), ((1281, 1280), (96, 128))])
def test_pixels_that_are_no_squares(tmp_path: Path, aspect: tuple[int, int], size: tuple[int, int]) -> None:
    path = tmp_path / "v.mp4"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=30)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(*aspect)
        for number in range(12):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(numbered(number), format="rgb24")))
        out.mux(stream.encode(None))
    said = probe(path.read_bytes(), "mp4", Limits(), pixels=False)
    assert (said["height"], said["width"]) == size and said["pixel_aspect"] == pytest.approx(aspect[0] / aspect[1])
    assert number_of(decode(path.read_bytes(), "mp4", [9], size, Track.of(said))[0]) == 9


def image(picture: Image.Image, kind: str = "PNG", **options: object) -> np.ndarray:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return open_image(buffer.getvalue(), Limits())


def test_sixteen_bits_of_grey() -> None:
    ramp = np.linspace(0, 65535, 256, dtype=np.uint16)[None].repeat(8, 0)
    for kind in ("PNG", "TIFF"):
        assert np.array_equal(image(Image.fromarray(ramp), kind)[..., 0], ramp >> 8)


def of_swapped_colours() -> bytes:
    """The profile of a screen whose red shows green and whose green shows red: that of sRGB, two tags exchanged."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    tags = {srgb[at : at + 4]: srgb[at + 4 : at + 8] for at in range(132, 132 + 12 * srgb[131], 12)}
    red, green = (slice(at, at + 20) for at in (int.from_bytes(tags[name], "big") for name in (b"rXYZ", b"gXYZ")))
    swapped = bytearray(srgb)
    swapped[red], swapped[green] = srgb[green], srgb[red]
    return bytes(swapped).replace("sRGB".encode("utf-16-be"), "mine".encode("utf-16-be"))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colours_are_those_of_the_profile(kind: str, mode: str) -> None:
    red = Image.new("RGB", (8, 8), (200, 30, 60))
    picture = red.quantize() if mode == "P" else red.convert(mode)
    shown = image(picture, kind, lossless=True, icc_profile=of_swapped_colours())[4, 4]
    assert shown.tolist() == pytest.approx([30, 200, 60], abs=1)
    for profile in (ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), b"no profile"):
        assert image(picture, kind, lossless=True, icc_profile=profile)[4, 4].tolist() == [200, 30, 60]


def test_a_profile_for_other_pixels_is_left() -> None:
    assert (image(Image.new("L", (8, 8), 90), "PNG", icc_profile=of_swapped_colours()) == 90).all()
    red = image(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF", icc_profile=of_swapped_colours())[4, 4]
    assert red[0] > 200 and red[1:].max() < 60


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_what_is_transparent_is_white(kind: str) -> None:
    hidden = np.zeros((8, 8, 4), np.uint8)
    hidden[..., 0] = 200  # red below
    hidden[4:, :, 3] = 255
    shown = image(Image.fromarray(hidden), kind, lossless=True)
    assert (shown[:4] == 255).all() and (shown[4:] == (200, 0, 0)).all()


def test_transparent_palettes_and_half_transparent_pixels() -> None:
    palette = Image.new("P", (8, 8))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((0, 0), 1)
    shown = image(palette, transparency=0)
    assert (shown[0, 0] == (40, 50, 60)).all() and (shown[1:] == 255).all()
    assert (image(Image.new("LA", (4, 4), (0, 128))) == 127).all()


def test_a_video_with_transparency_is_laid_on_white(tmp_path: Path) -> None:
    path = tmp_path / "v.mov"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("prores_ks", rate=30, options={"profile": "4444"})
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuva444p10le"
        rgba = np.concatenate((numbered(5), np.full((HEIGHT, WIDTH, 1), 255, np.uint8)), 2)
        rgba[HEIGHT // 2 :, :, 3] = 0
        frame = av.VideoFrame.from_ndarray(rgba, format="rgba").reformat(format="yuva444p10le")
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    said = probe(path.read_bytes(), "mov", Limits())
    shown = decode(path.read_bytes(), "mov", [0], (HEIGHT, WIDTH), Track.of(said))[0]
    assert said["careful"] and number_of(shown) == 5 and shown[HEIGHT // 2 + 8 :].min() > 250


def two_streams(path: Path, marked: int) -> bytes:
    """Stream 0 shows numbers from 0 on, stream 1, the larger one, from 100 on; one is marked as default."""
    with av.open(str(path), "w") as out:
        streams = []
        for number, size in enumerate(((HEIGHT, WIDTH), (2 * HEIGHT, 2 * WIDTH))):
            stream = out.add_stream("libx264", rate=30)
            stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
            flags = type(stream.disposition)
            stream.disposition = flags.default if number == marked else flags(0)
            streams.append((stream, size))
        for n in range(40):
            for number, (stream, size) in enumerate(streams):
                out.mux(stream.encode(av.VideoFrame.from_ndarray(numbered(n + 100 * number, *size), format="rgb24")))
        for stream, _ in streams:
            out.mux(stream.encode(None))
    return path.read_bytes()


@pytest.mark.parametrize("marked", [0, 1])
@pytest.mark.parametrize("extension", ["mp4", "mkv"])
def test_of_two_streams_the_index_chooses_one_for_all(tmp_path: Path, extension: str, marked: int) -> None:
    data = two_streams(tmp_path / f"v.{extension}", marked)
    said = probe(data, extension, Limits())
    assert (said["stream"], said["height"]) == (marked, HEIGHT * (1 + marked))
    for first in (0, 30):
        got = decode(data, extension, [first, first + 7], (said["height"], said["width"]), Track.of(said))
        assert [number_of(picture) for picture in got] == [first + 100 * marked, first + 7 + 100 * marked]


def test_a_cover_picture_is_no_video(tmp_path: Path) -> None:
    path = tmp_path / "v.mp4"
    with av.open(str(path), "w") as out:
        cover, video = out.add_stream("mjpeg", rate=1), out.add_stream("libx264", rate=30)
        cover.height, cover.width, cover.pix_fmt = 480, 640, "yuvj420p"
        cover.disposition = type(cover.disposition).attached_pic
        video.height, video.width, video.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        out.mux(cover.encode(av.VideoFrame.from_ndarray(numbered(1, 480, 640), format="rgb24")))
        for number in range(12):
            out.mux(video.encode(av.VideoFrame.from_ndarray(numbered(number), format="rgb24")))
        for stream in (cover, video):
            out.mux(stream.encode(None))
    said = probe(path.read_bytes(), "mp4", Limits())
    assert (said["frames"], said["height"]) == (12, HEIGHT)
    assert number_of(decode(path.read_bytes(), "mp4", [7], (HEIGHT, WIDTH), Track.of(said))[0]) == 7


def hdr(path: Path, transfer: int) -> bytes:
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx265", rate=30, options={"x265-params": "log-level=none"})
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p10le"
        codec = stream.codec_context
        codec.color_trc, codec.color_primaries, codec.colorspace, codec.color_range = transfer, 9, 9, 1
        for number in range(10):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(numbered(number), format="rgb24")))
        out.mux(stream.encode(None))
    return path.read_bytes()


@pytest.mark.parametrize(("transfer", "name"), [(16, "pq"), (18, "hlg"), (1, "")])
def test_hdr_is_told_and_mapped_where_that_is_asked_for(tmp_path: Path, transfer: int, name: str) -> None:
    data = hdr(tmp_path / "v.mp4", transfer)
    said = probe(data, "mp4", Limits(), pixels=False)
    assert said["transfer"] == name
    plain, mapped = (
        decode(data, "mp4", [3], (HEIGHT, WIDTH), Track.of(said), Options(conversion=Conversion(tone_map=on)))[0]
        for on in (False, True)
    )
    assert number_of(plain) == number_of(mapped) == 3
    assert (np.abs(plain.astype(int) - mapped).max() > 8) == bool(name)


def test_interlacing_is_told_and_taken_away_where_that_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "v.mp4"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=25, options={"x264-params": "interlaced=1"})
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        for n in range(10):
            picture = np.full((HEIGHT, WIDTH, 3), 40, np.uint8)
            for field in (0, 1):  # a bar that moves by 8 pixels from field to field
                left = 8 * (2 * n + field) % 96
                picture[field::2, left : left + 16] = 220
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(stream.encode(None))
    data = path.read_bytes()
    said = probe(data, "mp4", Limits(), pixels=False)
    assert said["interlaced"]

    def combs(on: bool) -> float:
        options = Options(conversion=Conversion(deinterlace=on))
        shown = decode(data, "mp4", [4], (HEIGHT, WIDTH), Track.of(said), options)[0].astype(int)
        return float(np.abs(shown[1:] - shown[:-1]).mean())

    assert combs(True) < combs(False) / 3


def test_a_prompt_is_read_as_training_reads_it(tmp_path: Path) -> None:
    write_video(tmp_path / "v.mp4", [k / 24 for k in range(60)])
    Image.fromarray(numbered(9)).save(tmp_path / "i.png")
    with Pool(1) as pool:
        video, still = (Given(str(tmp_path / name), 16.0, Fit.crop, pool) for name in ("v.mp4", "i.png"))
        assert [number_of(picture) for picture in video.decoded(0, 7, (HEIGHT, WIDTH))] == [0, 2, 3, 5, 6, 8, 9]
        assert [number_of(picture) for picture in video.decoded(3, 4, (HEIGHT, WIDTH))] == [5, 6, 8, 9]
        assert video.frames == 40 and still.frames == 1
        assert [number_of(picture) for picture in still.decoded(0, 1, (HEIGHT, WIDTH))] == [9]
