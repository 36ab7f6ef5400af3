"""Does an object that left the picture come back as itself? Pieces of a long video with and without memory.

    python -m benchmarks.memory run_dir=runs/demo_memory [count=64] [split=test]

The first shot has the caption of a scene of the demo world in which an object leaves and comes back, and ends while it
is gone. The second shot has no caption, so nothing but an earlier frame says what comes back. A video is right if the
object has its colour and shape before and after, and is gone in between. Both columns have the same scenes and seeds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.report import write
from sora_train.config.load import load
from sora_train.core.media import contact_sheet, write_png
from sora_train.demo_world.judge import judge
from sora_train.demo_world.scenes import Scene, captions, describe, make_scene
from sora_train.evaluation.intervals import wilson
from sora_train.generation.long_video import in_pieces
from sora_train.generation.memory import remembers
from sora_train.generation.requests import Prompt, Shot, clip_size
from sora_train.operations.trained import load_sampler

_FIRST_S, _SECOND_S = 1.25, 1.0  # length of the shots: it is gone at the end of the first
_SHEETS = 8  # videos of which pictures are written


@dataclass(frozen=True)
class Told:
    """A scene, and its caption."""

    scene: Scene
    caption: str


def main() -> None:
    """Make the videos of every scene in both ways, and write the table."""
    given = dict(argument.split("=", 1) for argument in sys.argv[1:] if "=" in argument)
    run_dir, count, split = given["run_dir"], int(given.get("count", 64)), given.get("split", "test")
    config = load(run_dir)
    sampler = load_sampler(config, run_dir, torch.device("cpu"))
    size = clip_size(config, None, None, None, None)
    frames = round((_FIRST_S + _SECOND_S) * config.data.made_fps)

    def made(told: Told, number: int, memory: bool) -> np.ndarray:
        """The video of a scene."""
        shots = [Shot(_FIRST_S, told.caption), Shot(_SECOND_S, "")]
        pieces = in_pieces(config, sampler, Prompt(shots), size, frames, number, overlap=1, loop=False, memory=memory)
        return np.concatenate(list(pieces))

    every = _told(count, split)
    rows = [["the object comes back as itself", *(_rate(every, made, memory, run_dir) for memory in (True, False))]]
    trained = "trained the task `memory`" if remembers(config) else "did not train the task `memory`"
    about = (
        f"{count} scenes of the {split} split in which an object leaves; the second shot has no caption. The run "
        f"{trained}. A model that draws any object is right in 1 of 24."
    )
    write(f"Memory of what left the picture, {Path(run_dir).name}", about, ["", "with memory", "without"], rows)


def _told(count: int, split: str) -> list[Told]:
    rng = np.random.default_rng(0)
    scenes = [make_scene(rng, split, "return") for _ in range(count)]
    return [Told(scene, captions(scene, rng)["plain"]) for scene in scenes]


def _rate(every: list[Told], made: Callable[[Told, int, bool], np.ndarray], memory: bool, run_dir: str) -> str:
    right = 0
    for number, told in enumerate(every):
        video = made(told, number, memory)
        right += judge(video, describe(told.scene, {})["scene"])["identity"]
        if number < _SHEETS:
            folder = Path(run_dir) / "samples" / ("memory" if memory else "no_memory")
            folder.mkdir(parents=True, exist_ok=True)
            write_png(folder / f"{number}.png", contact_sheet(video, columns=len(video), scale=2))
    low, high = wilson(right, len(every))
    return f"{right / len(every):.1%} ({low:.0%} to {high:.0%})"


if __name__ == "__main__":
    main()
