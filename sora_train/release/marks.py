"""The choice of the invisible mark: the built-in one, or a network in a local file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np

from sora_train.core.cli import InputError
from sora_train.release.folder import ReleaseFolder
from sora_train.release.mark import ClassicalMark, Found

NONE = "none"


class Mark(Protocol):
    """An invisible mark that carries an id of 12 hexadecimal digits."""

    name: str

    @property
    def strengths(self) -> Sequence[float]:
        """Strengths to choose from, in ascending order; several are root mean squares of the change, in levels."""

    def embedded(self, pieces: Iterable[np.ndarray], id: str, strength: float) -> Iterator[np.ndarray]:
        """Embed an id of 12 hexadecimal digits into frames `(T, H, W, 3)` uint8, piece by piece."""

    def found(self, pieces: Iterable[np.ndarray]) -> Found:
        """Detect the mark of a video from its frames `(T, H, W, 3)` uint8."""


def mark_of(folder: ReleaseFolder) -> Mark | None:
    """Load the mark that the settings name; None with `none`. Raises InputError if its file is missing."""
    chosen = folder.settings.mark
    if chosen == NONE:
        return None
    if chosen == "classical":
        return ClassicalMark(folder.mark_key())
    path = folder.file(chosen)
    if not path.is_file():
        raise InputError(f"mark={chosen} in {folder.path}: it is classical, none, or a TorchScript file; none is there")
    from sora_train.release.video_seal import VideoSeal  # torch takes seconds to import

    return VideoSeal(path, folder.mark_key())
