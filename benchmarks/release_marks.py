"""Survival of the invisible mark, its false alarms, and the time that marking and signing take.

    python -m benchmarks.release_marks [clips=12] [unmarked=1000] [videos=[a.mp4,b.mp4]] [write=true]

Clips are drifting textures with the spectrum of pictures of the world, or 24 frames of each of `videos`, every third.
Each is marked at a strength (root mean square of brightness levels), encoded with x264 at several qualities, decoded,
and the mark looked for: found is a mark that is present, with 40 of its 48 bits or more. Unmarked clips are looked at
under the same key. Times are CPU time of one thread.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from rich.progress import track

from benchmarks.report import write
from sora_train.core.cli import run
from sora_train.core.media import encode_mp4, read_mp4, write_mp4
from sora_train.core.options import number, options
from sora_train.evaluation.intervals import wilson
from sora_train.release.folder import Settings, make
from sora_train.release.mark import BITS, STRENGTHS, ClassicalMark

SIZES = ((64, 64), (144, 192), (480, 832))
CRFS = (18, 23, 28, 35)
KEY, ID = b"benchmark" * 4, "a1b2c3d4e5f6"


@dataclass
class Options:
    """Command-line options."""

    clips: int = number(12, least=1)
    unmarked: int = number(1000, least=1)
    videos: list[str] = number([])
    write: bool = False


def texture(seed: int, size: tuple[int, int], frames: int = 16) -> np.ndarray:
    """Frames of a soft texture that drifts; every seed another."""
    rng, (height, width) = np.random.default_rng(seed), size
    spectrum = np.fft.rfft2(rng.normal(size=(height + 64, width + 64, 3)), axes=(0, 1))
    v, u = np.fft.fftfreq(height + 64)[:, None], np.fft.rfftfreq(width + 64)[None]
    spectrum /= (np.hypot(v, u) + 1 / width)[..., None] ** rng.uniform(0.9, 1.4)
    picture = np.fft.irfft2(spectrum, (height + 64, width + 64), axes=(0, 1))
    picture = 128 + picture / picture.std() * rng.uniform(20, 50)
    dy, dx = rng.integers(0, 3, 2)
    moved = [picture[(dy * t) % 64 :, (dx * t) % 64 :][:height, :width] for t in range(frames)]
    return np.clip(np.stack(moved), 0, 255).astype(np.uint8)


def part_of(path: str, size: tuple[int, int]) -> np.ndarray:
    """24 frames of a video, every third, at a size."""
    frames = []
    with av.open(path) as container:
        for place, frame in enumerate(container.decode(video=0)):
            if place % 3 == 0:
                frames.append(frame.reformat(width=size[1], height=size[0], format="rgb24").to_ndarray())
            if len(frames) == 24:
                break
    return np.stack(frames)


def survival(o: Options, mark: ClassicalMark) -> list[list[str]]:
    """A row for every size and strength: quality, and how often the mark is found after encoding."""
    rows = []
    for size in SIZES:
        clips = [part_of(path, size) for path in o.videos] or [texture(n, size) for n in range(o.clips)]
        for strength in track(STRENGTHS, f"{size[1]} x {size[0]}"):
            marked = [np.concatenate(list(mark.embedded([clip], ID, strength))) for clip in clips]
            error = [np.mean((a.astype(float) - b) ** 2) for a, b in zip(marked, clips, strict=True)]
            cells = []
            for crf in CRFS:
                found = [mark.found([read_mp4(encode_mp4(clip, 8, crf=crf))[0]]) for clip in marked]
                bits = min(one.agreeing(ID) for one in found)
                cells.append(f"{sum(one.is_that(ID) for one in found)} of {len(found)} ({bits} of {BITS} bits)")
            quality = 10 * np.log10(255**2 / np.mean(error))
            rows.append([f"{size[1]} x {size[0]}", f"{strength:g}", f"{quality:.1f}", *cells])
    return rows


def false_alarms(o: Options, mark: ClassicalMark) -> str:
    """A line about clips without a mark."""
    found = [mark.found([texture(10_000 + n, SIZES[n % 2], 2)]) for n in track(range(o.unmarked), "unmarked")]
    alarms = sum(one.present for one in found)
    low, high = wilson(alarms, len(found))
    most = max(one.strength for one in found)
    return (
        f"{alarms} of {len(found):,} clips without a mark show one (95%: {low:.2%} to {high:.2%}); the strongest "
        f"reaches {most:.0f}, and 60 are needed. A marked clip reaches up to 144."
    )


def timed(work: Callable[[], object], rounds: int = 20) -> float:
    """Median milliseconds of CPU time that some work takes."""
    taken = []
    for _ in range(rounds):
        began = time.process_time()
        work()
        taken.append(time.process_time() - began)
    return 1000 * float(np.median(taken))


def times(mark: ClassicalMark) -> str:
    """A line about the time that everything takes beside encoding."""
    from sora_train.release.certificates import make_authority
    from sora_train.release.provenance import Signing, read_manifest

    clip = texture(0, SIZES[2])
    with tempfile.TemporaryDirectory() as temporary:
        folder = make(Path(temporary) / "release", Settings("Benchmark"))
        make_authority(folder.path, "Benchmark")
        signing, roots = Signing(folder), folder.text("root.pem")
        path, draft, signed = (Path(temporary) / name for name in ("clip.mp4", "draft.mp4", "signed.mp4"))
        write_mp4(path, clip, 8)

        def sign() -> None:
            shutil.copyfile(path, draft)
            signing.sign(draft, signed, {"model": "benchmark"})

        per_frame = [
            timed(lambda: list(mark.embedded([clip], ID, STRENGTHS[1]))) / len(clip),
            timed(lambda: mark.found([clip])) / len(clip),
            timed(lambda: encode_mp4(clip, 8), 5) / len(clip),
        ]
        signs, verifies = timed(sign), timed(lambda: read_manifest(signed, roots))
        size = path.stat().st_size / 1e6
    return (
        f"At 832 x 480 a frame takes {per_frame[0]:.2f} ms to mark and {per_frame[1]:.2f} ms to look at, beside "
        f"{per_frame[2]:.1f} ms to encode. A file of {size:.1f} MB takes {signs:.1f} ms to sign and "
        f"{verifies:.1f} ms to verify."
    )


def main() -> int:
    """Print the table, and write it where asked."""
    o = options(Options, __doc__)
    mark = ClassicalMark(KEY)
    header = ["size", "strength", "PSNR, dB", *(f"found at CRF {crf}" for crf in CRFS)]
    rows, about = survival(o, mark), f"{false_alarms(o, mark)} {times(mark)}"
    if o.write:
        write("The invisible mark, and signing", about, header, rows)
    else:
        print(about, *(" | ".join(row) for row in [header, *rows]), sep="\n")
    return 0


if __name__ == "__main__":
    run(main)
