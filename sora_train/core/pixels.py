"""Conversion between decoded frames (uint8) and network tensors ([-1, 1])."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def to_video(frames_THWC: np.ndarray) -> Tensor:
    """View decoded frames as `video_TCHW`. They stay uint8: a quarter of fp32's bytes to copy to the device."""
    return torch.from_numpy(frames_THWC).permute(0, 3, 1, 2)


def to_unit(video_CTHW: Tensor) -> Tensor:
    """Convert uint8 pixels to fp32 in [-1, 1]."""
    return video_CTHW.float() / 127.5 - 1.0


def to_frames(video_CTHW: Tensor) -> np.ndarray:
    """Convert pixels in [-1, 1] to `frames_THWC`, uint8 on the host."""
    pixels = ((video_CTHW.float().clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8)
    return pixels.permute(1, 2, 3, 0).cpu().numpy()
