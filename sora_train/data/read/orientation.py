"""Display matrices: how stored pictures are rotated and mirrored to appear as players show them."""

from __future__ import annotations

import numpy as np

# what becomes of the directions right and down, (x, y) each, under a quarter turn counter-clockwise
_TURN = np.array([[0, -1], [1, 0]])
_MIRROR = np.array([[-1, 0], [0, 1]])


def from_matrix(matrix: bytes | None) -> tuple[int, bool]:
    """Degrees counter-clockwise, and whether the picture is mirrored (left to right) before that.

    `matrix` is FFmpeg's display matrix: nine numbers of the machine's byte order, 16.16 fixed point. One that turns by
    no quarter is taken for the nearest that does.
    """
    if matrix is None or len(matrix) != 36:
        return 0, False
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].astype(np.float64)
    directions = np.array([[a, b], [c, d]])
    if not np.any(directions):
        return 0, False
    near = {(turns, mirrored): float((directions * _directions(turns, mirrored)).sum())
            for mirrored in (False, True) for turns in range(4)}  # fmt: skip
    turns, mirrored = max(near, key=lambda one: near[one])
    return 90 * turns, mirrored


def upright(picture_HWC: np.ndarray, rotation: int, mirrored: bool) -> np.ndarray:
    """A stored picture as it is shown."""
    flat = picture_HWC[:, ::-1] if mirrored else picture_HWC
    return np.rot90(flat, rotation // 90)


def _directions(turns: int, mirrored: bool) -> np.ndarray:
    start = _MIRROR if mirrored else np.eye(2)
    return start @ np.linalg.matrix_power(_TURN, turns)
