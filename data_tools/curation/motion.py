"""Motion between two pictures by Farneback's dense optical flow; it hardly depends on a film's size and encoder."""

from __future__ import annotations

import cv2
import numpy as np

_BLUR = (5, 5)  # so that grain isn't taken for motion


def motion(first_HW: np.ndarray, second_HW: np.ndarray, seconds: float) -> float:
    """Mean speed of the optical flow, in diagonals of the picture per second.

    Args:
        first_HW: Gray picture, uint8.
        second_HW: The same `seconds` later.
        seconds: Time between them.
    """
    one, other = (cv2.GaussianBlur(picture, _BLUR, 0) for picture in (first_HW, second_HW))
    start = np.zeros((*first_HW.shape, 2), np.float32)
    flow = cv2.calcOpticalFlowFarneback(one, other, start, 0.5, 3, 15, 3, 5, 1.2, 0)
    speed = np.hypot(flow[..., 0], flow[..., 1]).mean()
    return float(speed / np.hypot(*first_HW.shape) / seconds)
