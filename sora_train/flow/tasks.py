"""Tasks as masks over latent frames: given frames (conditions, t = 0) and frames to generate.

To add a task, write a mask function here, enter it in `_MASKS`, add its name to `config.schema.TASKS`, and give it a
weight in `flow.tasks`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from sora_train.core.seeds import GIVEN_FRAMES, below, order


def given_frames(task: str, frames: int, seed: int) -> list[bool]:
    """Mask of the given latent frames of a clip; at least one frame is not given.

    Args:
        task: Name of the task.
        frames: Latent frames of the clip.
        seed: Seed of the visit, for tasks with a random mask.

    Raises:
        KeyError: The task is unknown.
    """
    return [False] if frames == 1 else _MASKS[task](frames, seed)


def _nothing(frames: int, seed: int) -> list[bool]:
    return [False] * frames


def _first_frame(frames: int, seed: int) -> list[bool]:
    return [True] + [False] * (frames - 1)


def _beginning(frames: int, seed: int) -> list[bool]:
    given = 1 + int(below(frames - 1, seed, GIVEN_FRAMES))
    return [True] * given + [False] * (frames - given)


def _end(frames: int, seed: int) -> list[bool]:
    return _beginning(frames, seed)[::-1]


def _both_ends(frames: int, seed: int) -> list[bool]:
    """Frames before and after a random gap, at least one each; of two frames, the first."""
    if frames == 2:
        return [True, False]
    gap = 1 + int(below(frames - 2, seed, GIVEN_FRAMES))
    first = 1 + int(below(frames - gap - 1, seed, GIVEN_FRAMES, 1))
    return [not first <= place < first + gap for place in range(frames)]


def _single_frames(frames: int, seed: int) -> list[bool]:
    """Random single frames: at least one, at most half of all."""
    count = 1 + int(below(max(1, frames // 2), seed, GIVEN_FRAMES))
    chosen = set(order(seed, GIVEN_FRAMES, np.arange(frames))[:count].tolist())
    return [place in chosen for place in range(frames)]


def _memory(frames: int, seed: int) -> list[bool]:
    """The first frame, and one or two adjacent frames after a gap; the last frame is generated.

    Trains the pieces of long videos, which see an earlier frame beside their overlap with the previous piece
    (`sora_train.generation.memory`). A clip of fewer than four latent frames is given the first frame alone.
    """
    if frames < 4:
        return _first_frame(frames, seed)
    overlap = 1 + int(below(min(2, frames - 3), seed, GIVEN_FRAMES))
    first = 2 + int(below(frames - 2 - overlap, seed, GIVEN_FRAMES, 1))
    return [place == 0 or first <= place < first + overlap for place in range(frames)]


_MASKS: dict[str, Callable[[int, int], list[bool]]] = {
    "text_to_video": _nothing,
    "image": _nothing,
    "image_to_video": _first_frame,
    "extension": _beginning,
    "extension_backwards": _end,
    "interpolation": _both_ends,
    "frames": _single_frames,
    "memory": _memory,
}
