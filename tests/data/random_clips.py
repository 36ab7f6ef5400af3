"""Random small videos with numbered frames, over the codecs and containers that FFmpeg writes here.

    python -m tests.data.random_clips COUNT [SEED=0] [LOG]

Clips go through the pool, and are held against a decode of all from the start. With LOG what came of each video is a
line of that file, and the same command goes on where it was.
"""

from __future__ import annotations

import io
import json
import random
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import av
import numpy as np

from sora_train.data.read.decode import DecodeError, Track, shown_at
from sora_train.data.read.pool import Pool
from tests.data.videos import HEIGHT, WIDTH, number_of, numbered

_TICKS = 90_000
_TIE = 1e-6  # seconds
_RATES = ("8", "10", "12", "15", "24000/1001", "24", "25", "30000/1001", "30", "48", "50", "60")
_MUXERS = {"m4v": "mp4", "mkv": "matroska", "ts": "mpegts", "mpg": "mpeg"}  # FFmpeg's names that aren't the extension
_FRAGMENTS = ("frag_keyframe+empty_moov", "frag_every_frame+empty_moov", "frag_keyframe+empty_moov+default_base_moof")


@dataclass
class Codec:
    """What an encoder may be asked for."""

    name: str
    containers: tuple[str, ...]
    formats: tuple[str, ...] = ("yuv420p",)
    options: tuple[dict[str, str], ...] = ({},)
    size: tuple[int, int] = (HEIGHT, WIDTH)
    rates: tuple[str, ...] = _RATES
    weight: float = 1.0
    frames: tuple[int, int] = (20, 70)


def _x264(**parameters: object) -> dict[str, str]:
    text = ":".join(f"{name.replace('_', '-')}={value}" for name, value in parameters.items())
    return {"preset": "veryfast", "x264-params": text}


def _x265(**parameters: object) -> dict[str, str]:
    more = "".join(f":{name.replace('_', '-')}={value}" for name, value in parameters.items())
    return {"preset": "ultrafast", "x265-params": "log-level=none:pools=none:frame-threads=1" + more}


_MOV = ("mp4", "mov", "m4v")
CODECS = (
    Codec("libx264", (*_MOV, "mkv", "avi", "ts"), ("yuv420p",), weight=6, options=(
        _x264(), _x264(bframes=0), _x264(open_gop=1, bframes=3, b_adapt=0), _x264(intra_refresh=1, bframes=0),
        _x264(bframes=4, b_pyramid="normal", b_adapt=0), _x264(slices=3), _x264(keyint="infinite"), _x264(interlaced=1),
        _x264(ref=4, scenecut=0), _x264(cabac=0, weightp=0),
    )),
    Codec("libx264", (*_MOV, "mkv"), ("yuv422p", "yuv444p", "yuv420p10le", "yuv422p10le", "yuv444p10le"), weight=2,
          options=(_x264(), _x264(open_gop=1, bframes=3, b_adapt=0), _x264(intra_refresh=1, bframes=0))),
    Codec("libx265", (*_MOV, "mkv", "ts"), ("yuv420p", "yuv420p10le", "yuv422p10le", "yuv444p"), weight=2, options=(
        _x265(), _x265(open_gop=0), _x265(bframes=0), _x265(bframes=4, b_adapt=0), _x265(radl=2, open_gop=0),
    )),
    Codec("libsvtav1", ("mp4", "mkv", "webm"), ("yuv420p", "yuv420p10le"), ({"preset": "12", "crf": "18"},),
          weight=0.3),
    Codec("libvpx", ("webm", "mkv"), options=(
        {"deadline": "realtime", "cpu-used": "8"},
        {"deadline": "good", "cpu-used": "5", "auto-alt-ref": "1", "lag-in-frames": "16"},
    )),
    Codec("libvpx-vp9", ("webm", "mkv", "mp4"), ("yuv420p", "yuv444p"), options=(
        {"deadline": "realtime", "cpu-used": "8"},
        {"deadline": "good", "cpu-used": "5", "auto-alt-ref": "1", "lag-in-frames": "16"},
    )),
    Codec("mpeg4", (*_MOV, "mkv", "avi", "ts"), options=({"q": "3"}, {"bf": "2"}, {"bf": "3", "flags": "+qpel"})),
    Codec("mpeg2video", ("ts", "mkv", "mpg"), options=({"bf": "0"}, {"bf": "2"}), rates=("24", "25", "30", "50", "60")),
    Codec("mjpeg", ("avi", "mov", "mkv", "mp4"), ("yuvj420p", "yuvj444p")),
    Codec("prores_ks", ("mov", "mkv"), ("yuv422p10le", "yuv444p10le"), weight=0.5),
    Codec("dvvideo", ("avi", "mov"), size=(576, 720), rates=("25",), weight=0.2, frames=(10, 20)),
    Codec("gif", ("gif",), ("rgb8",), rates=("10", "20", "25", "50"), weight=0.3),
)  # fmt: skip


class Clip(NamedTuple):
    """A random video."""

    about: str
    extension: str
    data: bytes


def random_clip(rng: random.Random, folder: Path) -> Clip:
    """One video, perhaps cut out of another by its packets alone, as `ffmpeg -ss -c copy` does."""
    codec = rng.choices(CODECS, [codec.weight for codec in CODECS])[0]
    extension, pixels = rng.choice(codec.containers), rng.choice(codec.formats)
    options, rate = rng.choice(codec.options), Fraction(rng.choice(codec.rates))
    count, gop = rng.randint(*codec.frames), rng.choice((1, 4, 12, 12, 30, 250))
    vfr = extension in (*_MOV, "mkv", "webm") and rng.random() < 0.2
    steps = [1 / rate * (rng.choice((1, 1, 2, 4)) if vfr else 1) for _ in range(count)]
    muxing: dict[str, str] = {}
    if extension in _MOV and rng.random() < 0.4:
        muxing["movflags"] = rng.choice((*_FRAGMENTS, "faststart"))
    if extension in ("webm", "mkv") and rng.random() < 0.3:
        muxing = {"live": "1"} if rng.random() < 0.5 else {"cluster_time_limit": "200"}
    path = folder / f"clip.{extension}"
    _write(path, codec, options | {"g": str(gop)}, pixels, rate, np.cumsum([0, *steps[:-1]]).tolist(), muxing)
    about = (
        f"{codec.name} {pixels} {extension} {float(rate):.3f} fps{' vfr' if vfr else ''} gop {gop} {options} {muxing}"
    )
    cuttable = codec.name not in ("dvvideo", "libsvtav1")  # PyAV copies no stream of AV1
    if cuttable and extension in (*_MOV, "mkv", "ts") and "movflags" not in muxing and rng.random() < 0.25:
        seconds = float(sum(steps)) * rng.uniform(0.1, 0.6)
        return Clip(f"{about} cut at {seconds:.2f} s", extension, _cut(path, folder / f"cut.{extension}", seconds))
    return Clip(about, extension, path.read_bytes())


def _write(
    path: Path, codec: Codec, options: dict[str, str], pixels: str, rate: Fraction, times: list[Fraction],
    muxing: dict[str, str],
) -> None:  # fmt: skip
    extension = path.suffix[1:]
    with av.open(str(path), "w", format=_MUXERS.get(extension, extension), options=muxing) as out:
        stream = out.add_stream(codec.name, rate=rate)
        stream.height, stream.width, stream.pix_fmt = *codec.size, pixels
        fixed = extension in ("avi", "mpg", "gif") or codec.name in ("mpeg4", "mpeg2video", "dvvideo")
        base = 1 / rate if fixed else Fraction(1, _TICKS)
        stream.codec_context.time_base = base
        stream.codec_context.thread_count = 1
        stream.options = options
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(numbered(number, *codec.size), format="rgb24").reformat(format=pixels)
            frame.pts, frame.time_base = round(Fraction(time) / base), base
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))


def _cut(source: Path, path: Path, seconds: float) -> bytes:
    """Packets from the last key before `seconds` on, with earlier times for them: what is before is hidden or lost."""
    with av.open(str(source)) as given, av.open(str(path), "w", format=_MUXERS.get(path.suffix[1:])) as out:
        stream = given.streams.video[0]
        packets = [packet for packet in given.demux(stream) if packet.dts is not None and packet.pts is not None]
        keys = [n for n, p in enumerate(packets) if p.is_keyframe and p.pts * stream.time_base <= seconds]
        start = keys[-1] if keys else 0
        shift = int(seconds / stream.time_base) if path.suffix != ".ts" else packets[start].dts
        copy = out.add_stream_from_template(stream)
        for packet in packets[start:]:
            packet.stream, packet.pts, packet.dts = copy, packet.pts - shift, packet.dts - shift
            out.mux(packet)
    return path.read_bytes()


class Truth(NamedTuple):
    """What a decode of all from the start shows: numbers and times, in the order that they come out."""

    numbers: list[int]
    times: list[float]


def decode_all(data: bytes, track: Track, height: int, width: int) -> Truth:
    """Every frame as FFmpeg decodes it from the first packet on."""
    numbers, times = [], []
    with av.open(io.BytesIO(data)) as file:
        stream = file.streams[track.stream]
        for frame in file.decode(stream):
            numbers.append(number_of(frame.reformat(width, height, "rgb24").to_ndarray()))
            times.append(len(times) / track.fps if frame.pts is None else float(frame.pts * stream.time_base))
    return Truth(numbers, times)


@dataclass
class Result:
    """What came of clips; `wrong` and `refused` say which."""

    right: int = 0
    wrong: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    careful: int = 0
    sequential: int = 0


def check(clip: Clip, pool: Pool, folder: Path, rng: random.Random, result: Result, asked: int = 3) -> None:
    """Ask for some clips of a video as training does, and for one frame alone; note what is wrong."""
    path = folder / f"asked.{clip.extension}"
    path.write_bytes(clip.data)
    try:
        depth = rng.random()
        said = pool.probe(str(path), clip.extension, pixels=depth > 0.25, whole=depth > 0.5).result()
    except DecodeError as error:
        result.refused.append(f"{clip.about}: {error}")
        return
    track, size = Track.of(said), (said["height"], said["width"])
    result.careful += track.careful
    result.sequential += track.sequential
    truth = decode_all(clip.data, track, *size)
    if len(truth.numbers) != track.frames or sorted(set(truth.numbers)) != truth.numbers:
        result.wrong.append(f"{clip.about}: {track.frames} frames indexed, {truth.numbers} come out")
        return
    for turn in range(asked + 1):
        count, step = (1, 1.0) if turn == asked else (rng.randint(1, 9), rng.choice((1, 1, 1.5, 2, 2.997)))
        first = rng.randrange(max(1, track.frames - round((count - 1) * step)))
        wanted = [min(first + n * step, track.frames - 1) for n in range(count)]
        if not track.vfr:
            wanted = [int(number) for number in wanted]
        early, late = (_places(truth, wanted, track, shift) for shift in (-_TIE, _TIE))
        try:
            got = pool.decode(
                str(path), clip.extension, (0, -1, None), wanted, size, (0, 0, *size), track=track
            ).result()
        except DecodeError as error:
            result.refused.append(f"{clip.about}: {wanted}: {error}")
            continue
        seen = [number_of(picture) for picture in got]
        if all(
            truth.numbers[first] <= n <= truth.numbers[last] for n, first, last in zip(seen, early, late, strict=True)
        ):
            result.right += 1
        else:
            result.wrong.append(f"{clip.about}: {wanted} of {track} gave {seen}, right is {early}")


def _places(truth: Truth, wanted: list[float], track: Track, shift: float) -> list[int]:
    """Which frames are meant; `shift` in seconds, since where one frame follows another both are right."""
    if not track.vfr:
        return [int(number) for number in wanted]
    return shown_at(np.array(truth.times), [number + shift * track.fps for number in wanted], track.fps)


def campaign(count: int, seed: int, folder: Path, log: Path | None = None) -> Result:
    """Make `count` videos and ask for clips of each."""
    found = [Result(**json.loads(line)) for line in log.read_text().splitlines()] if log and log.is_file() else []
    with Pool(1, timeout_s=60) as pool:
        for number in range(len(found), count):
            rng = random.Random(f"{seed} {number}")
            found.append(Result())
            check(random_clip(rng, folder), pool, folder, rng, found[-1])
            if log:
                with log.open("a") as file:
                    file.write(json.dumps(asdict(found[-1])) + "\n")
    return Result(
        sum(one.right for one in found), [line for one in found for line in one.wrong],
        [line for one in found for line in one.refused], sum(one.careful for one in found),
        sum(one.sequential for one in found),
    )  # fmt: skip


def _kinds(lines: list[str]) -> Iterator[tuple[str, int]]:
    yield from Counter(" ".join(line.split()[:3]) for line in lines).most_common()


def main() -> None:
    """Run a campaign and print what came of it."""
    count, seed, log = (*sys.argv[1:], *("", "0", "")[len(sys.argv) - 1 :])
    with TemporaryDirectory() as folder:
        result = campaign(int(count), int(seed), Path(folder), Path(log) if log else None)
    print(
        f"{count} videos, seed {seed}: {result.right} clips right, {len(result.wrong)} wrong, "
        f"{len(result.refused)} refused; {result.careful} videos left to PyAV, {result.sequential} from the start"
    )
    for name in ("wrong", "refused"):
        lines = getattr(result, name)
        print(f"{name}: {dict(_kinds(lines))}")
        print("\n".join(lines[:12]))


if __name__ == "__main__":
    main()
