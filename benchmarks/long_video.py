"""A minute of video and more, piece by piece: memory by length, and whether the pieces join without a jump.

    python -m benchmarks.long_video run_dir=runs/demo [seconds=15,30,60,360] [overlap=2]

Each length is made in a process of its own by the trained model of a run, one video for each of three objects, from
captions that send the object another way every two seconds, and written to a file as it is made. A seam's change is
the mean difference between the first frame of a piece and the last one before it. 360 s at the demo's 4 frames a second
are as many frames as 60 s at 24.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from benchmarks.report import write
from sora_train.config.load import load
from sora_train.config.schema import Config
from sora_train.demo_world.detect import Sighting, direction_of, shape_of, sight
from sora_train.evaluation.motion import changes, seam_jumps, worst_place
from sora_train.generation.long_video import in_pieces
from sora_train.generation.output import save_sample
from sora_train.generation.requests import Prompt, Shot, clip_size
from sora_train.generation.sampler import Sampler
from sora_train.operations.trained import load_sampler

_SHOT_S = 2.0
_CAPTION = "a large {colour} {shape} moves slowly {way} over a dark field"
_TO = {"right": "to the right", "left": "to the left", "up": "up", "down": "down"}


@dataclass(frozen=True)
class Told:
    """The object of a video, and the ways it is sent in turn."""

    colour: str
    shape: str
    ways: tuple[str, ...]


_TOLD = (
    Told("red", "square", ("right", "left")), Told("blue", "ring", ("left", "right")),
    Told("green", "triangle", ("right", "down", "left", "up")),
)  # fmt: skip


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
            f"{found['largest_ratio']:.2f}", f"{found['right']:.0%}", f"{found['moved']} of {found['shots']}",
            f"{found['shaped']} of {found['shots']}",
            f"{found['cpu_s'] / found['all_frames'] * 1000:.0f} ms",
        ])  # fmt: skip
    about = (
        f"Pieces of the trained length; within a shot they share {overlap} latent frames with the one before. Three "
        "videos of one object each, two sent to and fro and one round about by a new caption every 2 s. The change at "
        "seams beside that at all other places, and beside that at other places between two latent frames, where the "
        "VAE makes it larger: 1 is a seam like any other. Of the places between two latent frames of a piece, the one "
        "with the largest change (median) beside the others: a jump that is moved away from the seam shows there."
    )
    header = [
        "", "peak memory of the process", "change at seams / elsewhere, medians", "/ between latent frames, medians",
        "worst place of a piece / other places", "largest / largest elsewhere", "frames of one object in its colour",
        "shots that move as told", "shots with the shape told", "CPU time per frame",
    ]  # fmt: skip
    config = load(given["run_dir"])
    title = f"Long video by extension, {Path(given['run_dir']).name} of {config.model.depth} blocks"
    write(title, about, header, rows)


def make(run_dir: str, seconds: float, overlap: int) -> dict[str, float]:
    """Make a video of each object, keeping of it only what is measured; ratios are means over the videos."""
    torch.set_num_threads(1)
    config = load(run_dir)
    sampler = load_sampler(config, run_dir, torch.device("cpu"))
    loaded, spent, watches = _peak_mib(), 0.0, []
    for told in _TOLD:
        watch = _Watch(told, config.data.made_fps)
        pieces = watch.pieces(_pieces(config, sampler, told, seconds, overlap))
        with TemporaryDirectory() as folder:
            start = time.process_time()
            save_sample(Path(folder), "long", pieces, config.data.made_fps, {})
            spent += time.process_time() - start
        watches.append(watch)
    ratios = [watch.ratios(config.vae.temporal_stride) for watch in watches]
    frames = sum(watch.frames for watch in watches)
    return {
        "frames": watches[0].frames, "pieces": 1 + len(watches[0].seams), "loaded_mib": loaded,
        "peak_mib": _peak_mib(), "right": sum(watch.right for watch in watches) / frames, "cpu_s": spent,
        "all_frames": frames,
        **{key: statistics.mean(found[key] for found in ratios) for key in ratios[0]},
        **{key: sum(watch.as_told()[key] for watch in watches) for key in ("shots", "moved", "shaped")},
    }  # fmt: skip


def _pieces(config: Config, sampler: Sampler, told: Told, seconds: float, overlap: int) -> Iterator[np.ndarray]:
    captions = [_CAPTION.format(colour=told.colour, shape=told.shape, way=_TO[way]) for way in told.ways]
    shots = [Shot(_SHOT_S, captions[n % len(captions)]) for n in range(max(1, round(seconds / _SHOT_S)))]
    whole = clip_size(config, None, None, None, seconds)
    piece = (min(whole[0], config.data.max_frames), *whole[1:])
    return in_pieces(config, sampler, Prompt(shots), piece, whole[0], 0, overlap=overlap, loop=False)


class _Watch:
    """Measures pieces as they go by."""

    def __init__(self, told: Told, fps: float) -> None:
        self.told, self._fps = told, fps
        self.frames = self.right = self.side = 0
        self.changes: list[float] = []
        self.seams: list[int] = []
        self.seen: list[list[Sighting]] = []  # the objects of each frame
        self._last: np.ndarray | None = None

    def pieces(self, made: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        """The pieces, measured."""
        for piece in made:
            if self._last is not None:
                self.seams.append(self.frames)
                self.changes += changes(np.stack((self._last, piece[0]))).tolist()
            self.changes += changes(piece).tolist()
            seen = [sight(frame) for frame in piece]
            self.right += sum(len(s) == 1 and s[0].colour == self.told.colour for s in seen)
            self.seen, self.side = self.seen + seen, min(piece.shape[1:3])
            self.frames, self._last = self.frames + len(piece), piece[-1]
            yield piece

    def ratios(self, stride: int) -> dict[str, float]:
        """The change at seams beside that at other places."""
        every = np.array(self.changes)
        median, largest = seam_jumps(every, self.seams)
        between, seams = every[::stride], [1 + (seam - 1) // stride for seam in self.seams]
        return {
            "median_ratio": median, "largest_ratio": largest, "latent_ratio": seam_jumps(between, seams)[0],
            "worst_place": worst_place(between, seams),
        }  # fmt: skip

    def as_told(self) -> dict[str, int]:
        """Whole shots, and in how many of them the object goes and looks as the caption says."""
        length = round(_SHOT_S * self._fps)
        shots = [self.seen[first : first + length] for first in range(0, len(self.seen) - length + 1, length)]
        tracks = [[s[0] for s in shot if len(s) == 1] for shot in shots]
        return {
            "shots": len(shots),
            "moved": sum(
                direction_of(t, self.side) == way for t, way in zip(tracks, cycle(self.told.ways), strict=False)
            ),
            "shaped": sum(bool(t) and shape_of(t) == self.told.shape for t in tracks),
        }


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
