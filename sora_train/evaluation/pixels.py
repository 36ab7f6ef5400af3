"""How near one video is to another, pixel for pixel: what a VAE loses."""

from __future__ import annotations

import numpy as np
import torch
from torchmetrics.functional.image import structural_similarity_index_measure


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 arrays of one shape; `inf` if they are equal.

    10 log10(255^2 / MSE), the mean taken over the whole array (ITU-T J.340, with the error of a whole clip in one
    mean rather than a mean of per-frame decibels). Raises ValueError for other types, or shapes that differ.
    """
    _check(a, b)
    error = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return float("inf") if error == 0 else float(10 * np.log10(255.0**2 / error))


def ssim(a_THWC: np.ndarray, b_THWC: np.ndarray) -> float:
    """Mean structural similarity of the frames of two uint8 videos `(T, H, W, C)`: 1 for equal ones.

    Z. Wang et al., "Image quality assessment: from error visibility to structural similarity", IEEE TIP 13 (2004),
    with torchmetrics' Gaussian window of 11 pixels, per channel. Raises ValueError for other types or shapes, or
    frames with a side under 11 pixels.
    """
    _check(a_THWC, b_THWC)
    if a_THWC.ndim != 4 or min(a_THWC.shape[1:3]) < 11:
        raise ValueError(f"need videos (T, H, W, C) with sides of 11 pixels or more, got {a_THWC.shape}")
    a, b = (torch.from_numpy(np.ascontiguousarray(one)).permute(0, 3, 1, 2).float() for one in (a_THWC, b_THWC))
    value = structural_similarity_index_measure(a, b, data_range=255.0)
    return float(value[0] if isinstance(value, tuple) else value)


def _check(a: np.ndarray, b: np.ndarray) -> None:
    if a.shape != b.shape or a.dtype != np.uint8 or b.dtype != np.uint8 or not a.size:
        raise ValueError(f"need two uint8 arrays of one shape, got {a.dtype} {a.shape} and {b.dtype} {b.shape}")
