"""Augmentations of a decoded clip together with its caption, drawn for every visit: `data.augment`.

A plugin registers one under a name (`config.registry.AUGMENTATIONS`):

    def reverse(frames_THWC, caption, rng): ...

It gets a clip's frames `(T, H, W, 3)` uint8, which it must not modify, the caption drawn for the visit, and a NumPy
generator seeded by the visit, so that a resumed run and any number of ranks draw the same. It returns frames of the
same shape and type, and their caption. Only clips of training are augmented.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from sora_train.core.cli import InputError
from sora_train.core.seeds import AUGMENT, hash64

Augmentation = Callable[[np.ndarray, str, np.random.Generator], tuple[np.ndarray, str]]

_SIDES = {"left": "right", "right": "left"}
_SIDE = re.compile(r"\b(left|right)(?=(?:wards?|most|-hand|-side)?\b)", re.IGNORECASE)


def mirror(frames_THWC: np.ndarray, caption: str, rng: np.random.Generator) -> tuple[np.ndarray, str]:
    """Mirror every second visit, on average, and swap left and right in its caption. Not for pictures with writing."""
    if rng.random() < 0.5:
        return frames_THWC, caption
    return frames_THWC[:, :, ::-1], _SIDE.sub(_other_side, caption)


def _other_side(found: re.Match[str]) -> str:
    word = found[0]
    other = _SIDES[word.lower()]
    return other.upper() if word.isupper() else other.capitalize() if word[0].isupper() else other


def augmented(
    name: str, augment: Augmentation, frames_THWC: np.ndarray, caption: str, seed: int
) -> tuple[np.ndarray, str]:
    """A clip after an augmentation; `seed` is its visit's. Raises InputError if the frames are no longer the clip's."""
    shown = frames_THWC.view()
    shown.flags.writeable = False  # the same frames may serve a later visit
    frames, text = augment(shown, caption, np.random.default_rng(int(hash64(seed, AUGMENT))))
    if frames.shape != frames_THWC.shape or frames.dtype != frames_THWC.dtype:
        wanted = f"{frames_THWC.shape} of {frames_THWC.dtype}"
        raise InputError(f"data.augment={name} made {frames.shape} of {frames.dtype} from a clip {wanted}; keep these")
    return np.array(frames), text
