"""From decoded pixels to the network's input range."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def to_video(frames_THWC: np.ndarray) -> Tensor:
    """Decoded frames as `video_TCHW`, still uint8 (a quarter of the bytes on the way to the device)."""
    return torch.from_numpy(frames_THWC).permute(0, 3, 1, 2)


def to_unit(video_CTHW: Tensor) -> Tensor:
    """uint8 pixels to fp32 in [-1, 1]."""
    return video_CTHW.float() / 127.5 - 1.0


def to_frames(video_CTHW: Tensor) -> np.ndarray:
    """Pixels in [-1, 1] to `frames_THWC` uint8 on the host."""
    pixels = ((video_CTHW.float().clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8)
    return pixels.permute(1, 2, 3, 0).cpu().numpy()
