"""Tasks as frame masks: which latent frames of a clip are given (t = 0) and which are to be generated.

To add a task: a function here, its name in `config.TASKS`, a weight under `flow.tasks`.
"""

from __future__ import annotations

from collections.abc import Callable

from sora_train.seeds import GIVEN_FRAMES, below


def given_frames(task: str, frames: int, seed: int) -> list[bool]:
    """Which of `frames` latent frames are given; at least one never is. Raises KeyError for an unknown task."""
    return [False] if frames == 1 else _MASKS[task](frames, seed)


def _nothing(frames: int, seed: int) -> list[bool]:
    return [False] * frames


def _first_frame(frames: int, seed: int) -> list[bool]:
    return [True] + [False] * (frames - 1)


def _beginning(frames: int, seed: int) -> list[bool]:
    given = 1 + int(below(frames - 1, seed, GIVEN_FRAMES))
    return [True] * given + [False] * (frames - given)


_MASKS: dict[str, Callable[[int, int], list[bool]]] = {
    "text_to_video": _nothing,
    "image": _nothing,
    "image_to_video": _first_frame,
    "extension": _beginning,
}
