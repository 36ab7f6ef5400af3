"""A minute of video and more, piece by piece: memory by length, and whether the pieces join without a jump.

    python -m benchmarks.long_video run_dir=runs/demo [seconds=15,30,60,360] [overlap=2]

Each length is made in a process of its own by the trained model of a run, from captions that send one object to and fro
every two seconds, and written to a file as it is made. A seam's change is the mean difference between the first frame
of a piece and the last one before it. 360 s at the demo's 4 frames a second are as many frames as 60 s at 24.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from benchmarks.report import write
from sora_train.config.load import load
from sora_train.config.schema import Config
from sora_train.demo_world.detect import Sighting, direction_of, sight
from sora_train.evaluation.motion import changes, seam_jumps, worst_place
from sora_train.generation.long_video import in_pieces
from sora_train.generation.output import save_sample
from sora_train.generation.requests import Prompt, Shot, clip_size
from sora_train.generation.sampler import Sampler
from sora_train.operations.trained import load_sampler

_SHOT_S = 2.0
_CAPTION = "a large red square drifts to the {way} over a dark field"
_WAYS = ("right", "left")


def main() -> None:
    """Measure every length and write the table."""
    given = dict(argument.split("=", 1) for argument in sys.argv[1:] if "=" in argument)
    if "one" in given:
        print(json.dumps(make(given["run_dir"], float(given["one"]), int(given["overlap"]))))
        return
    rows = []
    overlap = given.get("overlap", "2")
    for seconds in given.get("seconds", "15,30,60,360").split(","):
        command = [sys.executable, "-m", "benchmarks.long_video", f"run_dir={given['run_dir']}", f"one={seconds}"]
        done = subprocess.run([*command, f"overlap={overlap}"], capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        rows.append([
            f"{float(seconds):g} s, {found['frames']:,} frames, {found['pieces']} pieces",
            f"{found['peak_mib']:.0f} MiB ({found['loaded_mib']:.0f} before the first frame)",
            f"{found['median_ratio']:.2f}", f"{found['latent_ratio']:.2f}", f"{found['worst_place']:.2f}",
            f"{found['largest_ratio']:.2f}", f"{found['red']:.0%}", f"{found['right_shots']} of {found['shots']}",
            f"{found['cpu_s'] / found['frames'] * 1000:.0f} ms",
        ])  # fmt: skip
    about = (
        f"Pieces of the trained length that share {overlap} latent frames with the one before; an object sent to and "
        "fro by a new caption every 2 s. The change at seams beside that at all other places, and beside that at other "
        "places between two latent frames, where the VAE makes it larger: 1 is a seam like any other. Of the places "
        "between two latent frames of a piece, the one with the largest change (median) beside the others: a jump that "
        "is moved away from the seam shows there."
    )
    header = [
        "", "peak memory of the process", "change at seams / elsewhere, medians", "/ between latent frames, medians",
        "worst place of a piece / other places", "largest / largest elsewhere", "frames that show one red object",
        "shots that move as told", "CPU time per frame",
    ]  # fmt: skip
    config = load(given["run_dir"])
    title = f"Long video by extension, {Path(given['run_dir']).name} of {config.model.depth} blocks"
    write(title, about, header, rows)


def make(run_dir: str, seconds: float, overlap: int) -> dict[str, float]:
    """Make one video, keeping of it only what is measured."""
    torch.set_num_threads(1)
    config = load(run_dir)
    sampler = load_sampler(config, run_dir, torch.device("cpu"))
    watch = _Watch()
    with TemporaryDirectory() as folder:
        loaded, start = _peak_mib(), time.process_time()
        save_sample(
            Path(folder), "long", watch.pieces(_pieces(config, sampler, seconds, overlap)), config.data.made_fps, {}
        )
        spent = time.process_time() - start
    every, stride = np.array(watch.changes), config.vae.temporal_stride
    median, largest = seam_jumps(every, watch.seams)
    between, seams = every[::stride], [1 + (seam - 1) // stride for seam in watch.seams]
    latent, _ = seam_jumps(between, seams)
    return {
        "frames": watch.frames, "pieces": 1 + len(watch.seams), "loaded_mib": loaded, "peak_mib": _peak_mib(),
        "median_ratio": median, "latent_ratio": latent, "worst_place": worst_place(between, seams),
        "largest_ratio": largest, "red": watch.right / watch.frames, "cpu_s": spent,
        **_told(watch.seen, watch.side, config.data.made_fps),
    }  # fmt: skip


def _pieces(config: Config, sampler: Sampler, seconds: float, overlap: int) -> Iterator[np.ndarray]:
    count = max(1, round(seconds / _SHOT_S))
    shots = [Shot(_SHOT_S, _CAPTION.format(way=_WAYS[n % 2])) for n in range(count)]
    whole = clip_size(config, None, None, None, seconds)
    piece = (min(whole[0], config.data.max_frames), *whole[1:])
    return in_pieces(config, sampler, Prompt(shots), piece, whole[0], 0, overlap=overlap, loop=False)


class _Watch:
    """Measures pieces as they go by."""

    def __init__(self) -> None:
        self.frames = self.right = self.side = 0
        self.changes: list[float] = []
        self.seams: list[int] = []
        self.seen: list[list[Sighting]] = []  # the objects of each frame
        self._last: np.ndarray | None = None

    def pieces(self, made: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        for piece in made:
            if self._last is not None:
                self.seams.append(self.frames)
                self.changes += changes(np.stack((self._last, piece[0]))).tolist()
            self.changes += changes(piece).tolist()
            seen = [sight(frame) for frame in piece]
            self.right += sum(len(s) == 1 and s[0].colour == "red" for s in seen)
            self.seen, self.side = self.seen + seen, min(piece.shape[1:3])
            self.frames, self._last = self.frames + len(piece), piece[-1]
            yield piece


def _told(seen: list[list[Sighting]], side: int, fps: float) -> dict[str, float]:
    """Whole shots, and in how many of them the object goes where the caption sends it."""
    length = round(_SHOT_S * fps)
    shots = [seen[first : first + length] for first in range(0, len(seen) - length + 1, length)]
    ways = [direction_of([s[0] for s in shot if len(s) == 1], side) for shot in shots]
    return {"shots": len(shots), "right_shots": sum(way == _WAYS[n % 2] for n, way in enumerate(ways))}


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
