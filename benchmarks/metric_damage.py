"""Response of each metric to damage: five kinds, five strengths each, on clips of the demo world.

    python -m benchmarks.metric_damage [clips=12] [metrics=[quick]]

Prints a table: in how many of the five steps, from the clean clip to the most damaged, a figure's mean goes further in
one direction. 4 or 5 is a metric that sees this damage; fewer is one that is blind to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from scipy.ndimage import gaussian_filter

from sora_train.core.cli import run
from sora_train.core.options import options
from sora_train.demo_world.render import render
from sora_train.demo_world.scenes import describe, make_scene
from sora_train.evaluation.distances import measure_distances
from sora_train.evaluation.metric import Sample
from sora_train.evaluation.results import REAL, SAMPLES, Judges, summarise

STEPS = 5


def noise(video_THWC: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Gaussian noise with a deviation of 6 to 96 of 255."""
    noisy = video_THWC + rng.normal(0, 3 * 2**level, video_THWC.shape)
    return np.clip(noisy, 0, 255).astype(np.uint8)


def blur(video_THWC: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """A blur of 1 to 5 pixels."""
    return gaussian_filter(video_THWC.astype(np.float32), (0, level, level, 0)).astype(np.uint8)


def shuffle(video_THWC: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """A fifth to all of the frames change places in pairs; pairs changed at one level are changed at the next."""
    order, drawn = np.arange(len(video_THWC)), rng.permutation(len(video_THWC))
    pairs = drawn[: len(drawn) // 2 * 2].reshape(-1, 2)[: round(len(drawn) // 2 * level / STEPS)]
    order[pairs] = pairs[:, ::-1]
    return video_THWC[order]


def freeze(video_THWC: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """The last fifth to all of the frames stand still."""
    last = round((len(video_THWC) - 1) * (1 - level / STEPS))
    return video_THWC[np.minimum(np.arange(len(video_THWC)), last)]


def repeats(video_THWC: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Each frame is shown 2 to 6 times, and as many after it are left out."""
    return video_THWC[np.arange(len(video_THWC)) // (level + 1) * (level + 1)]


DAMAGES: dict[str, Callable[[np.ndarray, int, np.random.Generator], np.ndarray]] = {
    "noise": noise, "blur": blur, "shuffle": shuffle, "freeze": freeze, "repeats": repeats,
}  # fmt: skip


def clips(count: int) -> list[tuple[np.ndarray, Sample]]:
    """Clips of one moving object, 17 frames of 64 x 64."""
    rng = np.random.default_rng(5)
    found: list[tuple[np.ndarray, Sample]] = []
    while len(found) < count:
        scene = make_scene(rng, "train", "one")
        if scene.height == scene.width:
            scene = replace(scene, height=64, width=64, frames=17, fps=8)
            found.append((render(scene), Sample(str(len(found)), "a caption", 8.0, describe(scene, {}))))
    return found


def ladder(judges: Judges, originals: Sequence[tuple[np.ndarray, Sample]], damage: str) -> dict[str, list[float]]:
    """The mean of each figure from the clean clips to the most damaged ones."""
    found: dict[str, list[float]] = {}
    real = [judges.judge(video, None, sample) for video, sample in originals]
    for level in range(STEPS + 1):
        rng = np.random.default_rng(0)
        made = []
        for video, sample in originals:
            worse = DAMAGES[damage](video, level, rng) if level else video
            made.append(judges.judge(worse, video, sample))
        columns = {SAMPLES: made, REAL: real}
        for row in summarise(judges.metrics, columns):
            if SAMPLES in row.cells:
                found.setdefault(row.name, []).append(row.cells[SAMPLES].value)
        for figure in measure_distances(judges.distances, columns).get(SAMPLES, []):
            found.setdefault(figure.name, []).append(figure.made.value)
    return found


def steps_seen(values: Sequence[float]) -> int:
    """In how many steps the values go on in the direction that most of them take; up is positive."""
    signs = [np.sign(later - earlier) for earlier, later in zip(values, values[1:], strict=False)]
    ups, downs = signs.count(1.0), signs.count(-1.0)
    return ups if ups >= downs else -downs


@dataclass
class Options:
    """Command-line options."""

    clips: int = 12
    metrics: list[str] = field(default_factory=lambda: ["quick"])


def main() -> int:
    """Print the table."""
    from sora_train.evaluation.registry import choose

    o = options(Options, __doc__)
    judges, originals = choose(o.metrics, {}), clips(o.clips)
    ladders = {damage: ladder(judges, originals, damage) for damage in DAMAGES}
    print(f"| figure | {' | '.join(DAMAGES)} |\n| --- |{' --- |' * len(DAMAGES)}")
    for name in ladders["noise"]:
        cells = []
        for damage in DAMAGES:
            values = ladders[damage][name]
            cells.append(f"{steps_seen(values):+d} ({values[0]:.3g} to {values[-1]:.3g})")
        print(f"| {name} | {' | '.join(cells)} |")
    return 0


if __name__ == "__main__":
    run(main)
