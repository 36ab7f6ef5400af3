"""The frames of a sample: one array, or an iterable of pieces for a long video."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

Video = np.ndarray | Iterable[np.ndarray]  # frames_THWC uint8


def pieces_of(video: Video) -> Iterator[np.ndarray]:
    """Iterate over the pieces of a video; a single array is one piece."""
    return iter([video] if isinstance(video, np.ndarray) else video)
