"""Videos that were damaged before they were indexed, and what training makes of them.

    python -m tests.data.damaged_clips COUNT [CODEC=libx264] [SEED] [all]

Each is flipped in one to three bits, has a stretch of zeros, or is cut. A clip is wrong if a block of 16x16 pixels of
one of its frames differs by more than `VISIBLE` levels on average from the same frame of the file before the damage:
what concealment hides is less. With `all` they are indexed as by `probe=all`, which decodes every frame.
"""

from __future__ import annotations

import io
import random
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import av
import numpy as np

from sora_train.data.read.decode import DecodeError, Track
from sora_train.data.read.pool import Pool

VISIBLE = 12.0  # levels of 255
_SIZE = (192, 320)
_FRAMES = 32
_RATE = 24
_OPTIONS = {
    "libx264": (
        {"preset": "veryfast"}, {"preset": "veryfast", "x264-params": "bframes=0"},
        {"preset": "veryfast", "x264-params": "cabac=0"}, {"preset": "medium"},
    ),
    "libx265": ({"preset": "ultrafast", "x265-params": "log-level=none:pools=none:frame-threads=1"},
                {"preset": "ultrafast", "x265-params": "log-level=none:pools=none:frame-threads=1:open-gop=0"}),
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
    """What became of damaged files."""

    files: int = 0
    wrong: Counter[str] = field(default_factory=Counter)  # files with a wrong frame trained on, by kind
    whole: int = 0  # files of which everything asked for came, and was right
    unusable: Counter[str] = field(default_factory=Counter)  # files that the index refuses, by cause
    refused: int = 0  # files with a clip that was refused
    refused_right: int = 0  # of them, those that the decoder shows right all the same
    examples: list[str] = field(default_factory=list)


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


def _shown(data: bytes, track: Track) -> np.ndarray | None:
    """What a decoder shows from the start, whatever it complains about."""
    frames = []
    try:
        with av.open(io.BytesIO(data), metadata_errors="replace") as file:
            stream = file.streams[track.stream]
            for packet in file.demux(stream):
                try:
                    decoded = stream.codec_context.decode(packet if packet.size else None)
                    frames += [frame.to_ndarray(format="rgb24") for frame in decoded]
                except av.error.FFmpegError:
                    continue
    except (av.error.FFmpegError, IndexError):
        return None
    return np.stack(frames) if frames and len({frame.shape for frame in frames}) == 1 else None


def examine(kind: str, path: Path, true: np.ndarray, pool: Pool, out: Outcome, whole: bool = False) -> None:
    """Index a damaged video and ask for all of its frames, eight at a time."""
    out.files += 1
    data, extension = path.read_bytes(), path.suffix[1:]
    try:
        said = pool.probe(str(path), extension, pixels=whole, whole=whole).result()
    except DecodeError as error:
        out.unusable[error.cause] += 1
        return
    track, size = Track.of(said), (said["height"], said["width"])
    worst, refused = 0.0, []
    for first in range(0, min(track.frames, len(true)), 8):
        wanted = list(range(first, min(first + 8, track.frames, len(true))))
        try:
            got = pool.decode(str(path), extension, (0, -1, None), wanted, size, (0, 0, *size), track=track).result()
        except DecodeError as error:
            refused.append((wanted, str(error)))
            continue
        worst = max(worst, _difference_at(got, true, wanted, track) if size == true.shape[1:3] else 255.0)
    if worst > VISIBLE or track.frames > len(true) or (not track.vfr and abs(track.fps - _RATE) > 0.5):
        out.wrong[kind] += 1
        out.examples.append(f"{kind}: worst block {worst:.1f}, {track}")
    elif refused:
        shown = _shown(data, track)
        right = [shown is not None and wanted[-1] < len(shown) and shown.shape[1:3] == true.shape[1:3]
                 and difference(shown[wanted], true[wanted]) <= VISIBLE for wanted, _ in refused]  # fmt: skip
        out.refused += 1
        out.refused_right += all(right)
    else:
        out.whole += 1


def campaign(count: int, codec: str, seed: int, folder: Path, whole: bool = False) -> Outcome:
    """Damage and examine `count` files, twenty of each clean one."""
    rng, out = random.Random(seed), Outcome()
    with Pool(1, timeout_s=60) as pool:
        for number in range(count):
            if number % 20 == 0:
                extension = rng.choice(("mp4", "mp4", "mkv", "mov"))
                options, gop = rng.choice(_OPTIONS[codec]), rng.choice((12, 24, 250))
                clip = clean(codec, options, gop, extension, footage(np.random.default_rng(number + seed)), folder)
                path = folder / f"damaged.{extension}"
                path.write_bytes(clip)
                track = Track.of(pool.probe(str(path), extension).result())
                every = list(range(_FRAMES))
                true = pool.decode(
                    str(path), extension, (0, -1, None), every, _SIZE, (0, 0, *_SIZE), track=track
                ).result()
            kind, data = damaged(clip, rng)
            path.write_bytes(data)
            examine(kind, path, true, pool, out, whole)
    return out


def main() -> None:
    """Run a campaign and print what came of it."""
    count, codec = int(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "libx264"
    with TemporaryDirectory() as folder:
        seed, whole = int(sys.argv[3]) if len(sys.argv) > 3 else 0, "all" in sys.argv[4:]
        out = campaign(count, codec, seed, Path(folder), whole)
    print(f"{out.files} files of {codec}: {out.wrong.total()} with wrong frames trained on {dict(out.wrong)}, "
          f"{out.whole} whole, {out.unusable.total()} unusable {dict(out.unusable)}, {out.refused} with refused clips, "
          f"of them {out.refused_right} that a decoder shows right")  # fmt: skip
    print("\n".join(out.examples[:20]))


if __name__ == "__main__":
    main()
