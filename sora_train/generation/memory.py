"""Memory of a long video: each piece is conditioned on one earlier frame in addition to its overlap.

A piece with memory starts with one earlier frame at t = 0 and one latent frame that is generated but not shown; its
overlap with the previous piece follows. The task `memory` trains it (`sora_train.flow.tasks`). Attention to retrieved
earlier frames is that of Context as Memory (Yu et al. 2025, arXiv 2506.03141); retrieval here compares pixels, since
there is no camera path.
"""

from __future__ import annotations

import numpy as np

from sora_train.config.schema import Config

BEFORE_OVERLAP = 2  # latent frames of a piece before its overlap: the earlier frame, and one that isn't shown
_MOST = 64  # frames that are kept


class Memory:
    """Candidates for the earlier frame: the given beginning of the video, and one frame of every piece so far.

    Above a limit every other frame is dropped.
    """

    def __init__(self, given_HWC: np.ndarray | None = None) -> None:
        self._frames = [] if given_HWC is None else [given_HWC]
        self._every, self._pieces = 1, 0  # every how many pieces are kept, and how many there were

    def add(self, frame_HWC: np.ndarray) -> None:
        """Store a frame `(H, W, 3)` uint8 of a new piece."""
        if self._pieces % self._every == 0:
            self._frames.append(frame_HWC)
        self._pieces += 1
        if len(self._frames) > _MOST:
            self._frames, self._every = self._frames[::2], 2 * self._every

    def recall(self, last_HWC: np.ndarray) -> np.ndarray | None:
        """Return the stored frame that differs most from the last one shown, by mean squared error.

        None before the second piece.
        """
        if not self._pieces:
            return None
        last = last_HWC.astype(np.float32)
        return max(self._frames, key=lambda frame: float(np.square(frame - last).mean()))


def has_room(latents: int, overlap: int) -> bool:
    """Tell whether a piece of `latents` latent frames has room for memory, the overlap and at least one new frame."""
    return latents > BEFORE_OVERLAP + overlap


def remembers(config: Config) -> bool:
    """Tell whether a run trained the task `memory`."""
    stages = [stage.tasks for stage in config.data.stages if stage.tasks]
    return any(tasks.get("memory", 0.0) > 0 for tasks in (config.flow.tasks, *stages))
