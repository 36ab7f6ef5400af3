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
        """Strengths to choose from, the least first; root mean squares of brightness levels where they are a choice."""

    def embedded(self, pieces: Iterable[np.ndarray], id: str, strength: float) -> Iterator[np.ndarray]:
        """The frames with the mark, piece by piece."""

    def found(self, pieces: Iterable[np.ndarray]) -> Found:
        """The mark of a video."""


def mark_of(folder: ReleaseFolder) -> Mark | None:
    """The mark that the settings name. Raises InputError for a file that isn't there."""
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
