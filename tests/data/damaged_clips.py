"""Videos that were damaged before they were indexed, and what training makes of them.

    python -m tests.data.damaged_clips COUNT [CODEC=libx264] [SEED=0] [PROBE=all] [LOG]

Each is flipped in one to three bits, has a stretch of zeros, or is cut; then it is indexed as by `data.probe: PROBE`,
and all of its frames are asked for. It is wrong if a block of 16x16 pixels of a frame that came differs by more than
`VISIBLE` levels on average from the same frame of the file before the damage: what concealment hides is less. It is
refused though right if a decoder that hides its faults shows nothing so wrong. With LOG each outcome is a line of that
file, and the same command goes on where it was.
"""

from __future__ import annotations

import io
import json
import random
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import av
import numpy as np

from sora_train.config.schema import Probe
from sora_train.data.read.decode import DecodeError, Track
from sora_train.data.read.pool import Pool

VISIBLE = 12.0  # levels of 255
_CHECKS = "crccheck+bitstream+buffer+careful+compliant+aggressive"
_SIZE = (192, 320)
_FRAMES = 32
_RATE = 24
_OPTIONS = {
    "libx264": (
        {"preset": "veryfast"}, {"preset": "veryfast", "x264-params": "bframes=0"},
        {"preset": "veryfast", "x264-params": "cabac=0"}, {"preset": "medium"},
    ),
    "libx265": tuple(
        {"preset": "ultrafast", "x265-params": f"log-level=none:pools={pools}:frame-threads=1:open-gop={open_gop}"}
        for pools in ("none", "1") for open_gop in (0, 1)
    ),  # without threads there are no rows of which the beginnings are known
}  # fmt: skip


def footage(rng: np.random.Generator) -> np.ndarray:
    """A textured scene under a moving camera, with a thing that moves, `(T, H, W, 3)`."""
    height, width = _SIZE
    tall, wide = height + 48, width + 96
    scene = np.zeros((tall, wide, 3), np.float32)
    for cell in (4, 8, 16, 32):
        noise = rng.normal(0, cell, (tall // cell + 1, wide // cell + 1, 3))
        scene += noise.repeat(cell, 0).repeat(cell, 1)[:tall, :wide]
    frames = []
    for t in range(_FRAMES):
        top, left = round(24 + 20 * np.sin(t / 17)), round(48 + 40 * np.sin(t / 23))
        view = 120 + scene[top : top + height, left : left + width]
        y, x = 20 + 2 * t, 130 - 2 * t
        view[y : y + 30, x : x + 30] = 220 - view[y : y + 30, x : x + 30]
        frames.append(np.clip(view + rng.normal(0, 1.5, (height, width, 1)), 0, 255).astype(np.uint8))
    return np.stack(frames)


def clean(codec: str, options: dict[str, str], gop: int, extension: str, frames: np.ndarray, folder: Path) -> bytes:
    """A whole video of the frames."""
    path = folder / f"clean.{extension}"
    with av.open(str(path), "w", options={"movflags": "faststart"} if extension == "mp4" else {}) as out:
        stream = out.add_stream(codec, rate=_RATE)
        stream.height, stream.width, stream.pix_fmt = *_SIZE, "yuv420p"
        stream.codec_context.thread_count, stream.options = 1, options | {"g": str(gop)}
        for picture in frames:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(stream.encode(None))
    return path.read_bytes()


def damaged(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """The kind of damage, and the bytes."""
    kind = rng.choice(("flips", "flips", "zeros", "cut"))
    changed = bytearray(data)
    if kind == "flips":
        for _ in range(rng.randint(1, 3)):
            changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == "zeros":
        at, length = rng.randrange(len(data)), rng.choice((16, 512, 4096))
        changed[at : at + length] = bytes(len(changed[at : at + length]))
    else:
        del changed[rng.randrange(len(data) // 10, len(data)) :]
    return kind, bytes(changed)


@dataclass
class Outcome:
    """What became of one damaged file."""

    number: int
    kind: str
    became: str  # wrong, whole, refused by the index or in part
    cause: str = ""  # of the refusal, or the difference of the wrong frame
    right: bool = False  # refused, and a decoder that hides its faults shows nothing wrong
    told: bool = False  # wrong, and FFmpeg with all of its checks says something of it


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest mean difference of a block of 16x16 pixels."""
    frames, height, width, _ = ours.shape
    levels = np.abs(ours.astype(np.int16) - theirs).mean(3)
    return float(levels.reshape(frames, height // 16, 16, width // 16, 16).mean((2, 4)).max())


def _difference_at(got: np.ndarray, true: np.ndarray, wanted: list[int], track: Track) -> float:
    """The largest difference from the frames of the clean file; where frames are missing, from those at their times."""
    if not track.vfr:
        return difference(got, true[wanted])
    middles = [int((number + 0.5) / track.fps * _RATE) for number in wanted]
    near = [[place for place in (at - 1, at, at + 1) if 0 <= place < len(true)] or [len(true) - 1] for at in middles]
    return max(min(difference(one[None], true[[at]]) for at in places) for one, places in zip(got, near, strict=True))


def _shown(data: bytes, track: Track) -> np.ndarray:
    """What a decoder shows from the start, whatever it complains about; no frames where it shows none."""
    frames: list[np.ndarray] = []
    try:
        with av.open(io.BytesIO(data), metadata_errors="replace") as file:
            stream = file.streams[track.stream] if track.stream >= 0 else file.streams.video[0]
            for packet in file.demux(stream):
                try:
                    decoded = stream.codec_context.decode(packet if packet.size else None)
                    frames += [frame.to_ndarray(format="rgb24") for frame in decoded]
                except av.error.FFmpegError:
                    continue
    except (av.error.FFmpegError, IndexError, AttributeError):  # the last where a stream's decoder isn't known
        return np.empty((0, 0, 0, 3), np.uint8)
    same = len({frame.shape for frame in frames}) == 1
    return np.stack(frames) if same else np.empty((0, 0, 0, 3), np.uint8)


def _is_right(shown: np.ndarray, true: np.ndarray) -> bool:
    """Tell whether the frames that are shown are the first of those before the damage."""
    count = len(shown)
    return 0 < count <= len(true) and shown.shape[1:] == true.shape[1:] and difference(shown, true[:count]) <= VISIBLE


def _is_told(data: bytes) -> bool:
    """Tell whether FFmpeg reports damage, with all of its checks, in a decode from the start."""
    from sora_train.data.read.by_pyav import Complaints

    with Complaints() as complaints:
        try:
            with av.open(io.BytesIO(data), metadata_errors="replace", options={"err_detect": _CHECKS}) as file:
                stream = file.streams.video[0]
                stream.codec_context.options = {"err_detect": _CHECKS}
                stream.thread_type, stream.codec_context.thread_count = "NONE", 1
                for packet in file.demux(stream):
                    stream.codec_context.decode(packet if packet.size else None)
        except (av.error.FFmpegError, IndexError, AttributeError):
            return True
        return bool(complaints.take())


def examine(number: int, kind: str, path: Path, true: np.ndarray, pool: Pool, depth: Probe) -> Outcome:
    """Index a damaged video and ask for all of its frames, eight at a time."""
    data, extension = path.read_bytes(), path.suffix[1:]
    out = Outcome(number, kind, "whole")
    try:
        said = pool.probe(str(path), extension, pixels=depth is not Probe.packets, whole=depth is Probe.all).result()
    except DecodeError as error:
        out.became, out.cause, out.right = "unusable", error.cause, _is_right(_shown(data, Track(0, -1)), true)
        return out
    track, size = Track.of(said), (said["height"], said["width"])
    worst, refused = 0.0, []
    for first in range(0, min(track.frames, len(true)), 8):
        wanted = list(range(first, min(first + 8, track.frames, len(true))))
        try:
            got = pool.decode(str(path), extension, (0, -1, None), wanted, size, (0, 0, *size), track=track).result()
        except DecodeError as error:
            refused.append(wanted)
            out.cause = error.cause
            continue
        worst = max(worst, _difference_at(got, true, wanted, track) if size == true.shape[1:3] else 255.0)
    if worst > VISIBLE or track.frames > len(true) or (not track.vfr and abs(track.fps - _RATE) > 0.5):
        out.became, out.cause, out.told = "wrong", f"worst block {worst:.1f}, {track}", _is_told(data)
    elif refused:
        shown = _shown(data, track)
        out.became = "refused"
        out.right = all(wanted[-1] < len(shown) and _is_right(shown[wanted], true[wanted]) for wanted in refused)
    return out


def campaign(
    count: int, codec: str, seed: int, folder: Path, depth: Probe = Probe.all, log: Path | None = None
) -> list[Outcome]:
    """Damage and examine `count` files, twenty of each clean one."""
    done = [Outcome(**json.loads(line)) for line in log.read_text().splitlines()] if log and log.is_file() else []
    with Pool(1, timeout_s=60) as pool:
        for number in range(len(done), count):
            group = number - number % 20
            if number == group or number == len(done):
                rng = random.Random(f"{seed} {codec} {group}")
                extension = rng.choice(("mp4", "mp4", "mkv", "mov"))
                options, gop = rng.choice(_OPTIONS[codec]), rng.choice((12, 24, 250))
                clip = clean(codec, options, gop, extension, footage(np.random.default_rng(group + seed)), folder)
                path = folder / f"damaged.{extension}"
                path.write_bytes(clip)
                true = _frames(path, pool)
            kind, data = damaged(clip, random.Random(f"{seed} {codec} {number} damage"))
            path.write_bytes(data)
            done.append(examine(number, kind, path, true, pool, depth))
            if log:
                with log.open("a") as file:
                    file.write(json.dumps(asdict(done[-1])) + "\n")
    return done


def _frames(path: Path, pool: Pool) -> np.ndarray:
    """All frames of a whole video, as training gets them."""
    track, size = Track.of(pool.probe(str(path), path.suffix[1:]).result()), (0, 0, *_SIZE)
    every = list(range(_FRAMES))
    return pool.decode(str(path), path.suffix[1:], (0, -1, None), every, _SIZE, size, track=track).result()


def summary(done: Sequence[Outcome]) -> str:
    """The shares that are asked for, in a few lines."""
    became = {name: [one for one in done if one.became == name] for name in ("wrong", "whole", "unusable", "refused")}
    wrong, right = became["wrong"], [one for one in done if one.right]
    share, unusable = len(wrong) / len(done), became["unusable"]

    def by(outcomes: Sequence[Outcome], name: str) -> dict[str, int]:
        return dict(Counter(getattr(one, name) for one in outcomes))

    return (
        f"{len(done)} files: {len(wrong)} with wrong frames trained on ({share:.1%}) {by(wrong, 'kind')}, "
        f"of them {sum(one.told for one in wrong)} that FFmpeg reports with all of its checks; "
        f"{len(became['whole'])} whole; {len(unusable)} refused by the index {by(unusable, 'cause')}, "
        f"{len(became['refused'])} in part; {len(right)} refused though a decoder shows nothing wrong "
        f"({len(right) / len(done):.1%}) {by(right, 'kind')}"
    )  # fmt: skip


def main() -> None:
    """Run a campaign and print what came of it."""
    count, codec, seed, depth, log = (*sys.argv[1:], *("", "libx264", "0", "all", "")[len(sys.argv) - 1 :])
    with TemporaryDirectory() as folder:
        done = campaign(int(count), codec, int(seed), Path(folder), Probe(depth), Path(log) if log else None)
    print(f"{codec}, seed {seed}, probe={depth}: {summary(done)}")
    print("\n".join(f"{one.number} {one.kind}: {one.cause}" for one in done if one.became == "wrong"))


if __name__ == "__main__":
    main()
