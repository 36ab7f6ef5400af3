"""Measures of pixels: how near a video is to another, how sharp, and its colours."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sora_train.evaluation.metric import Metric, Models, Sample, Unavailable, metric, register

_SSIM_SIDE = 11  # pixels of the window


@metric("psnr", groups=("quick", "full"), better="up", needs=["real"], summary="median")
def psnr_figures(made_THWC: np.ndarray, real_THWC: np.ndarray | None, sample: Sample) -> dict[str, float]:
    """PSNR against the real video, in dB."""
    assert real_THWC is not None
    return {"psnr_db": psnr(made_THWC, real_THWC)}


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
    from torchmetrics.functional.image import structural_similarity_index_measure

    _check(a_THWC, b_THWC)
    if a_THWC.ndim != 4 or min(a_THWC.shape[1:3]) < _SSIM_SIDE:
        raise ValueError(f"need videos (T, H, W, C) with sides of 11 pixels or more, got {a_THWC.shape}")
    a, b = (_pictures(one) for one in (a_THWC, b_THWC))
    value = structural_similarity_index_measure(a, b, data_range=255.0)
    return float(value[0] if isinstance(value, tuple) else value)


def _build_ssim(models: Models) -> Metric:
    require_torchmetrics()

    def figures(made_THWC: np.ndarray, real_THWC: np.ndarray | None, sample: Sample) -> dict[str, float]:
        assert real_THWC is not None
        small = min(made_THWC.shape[1:3]) < _SSIM_SIDE
        return {"ssim": float("nan") if small else ssim(made_THWC, real_THWC)}

    return Metric("ssim", figures, "up", frozenset({"real"}))


register("ssim", ("quick", "full"), _build_ssim)


@metric("sharpness", groups=("quick", "full"), better=None)
def sharpness(made_THWC: np.ndarray, real_THWC: np.ndarray | None, sample: Sample) -> dict[str, float]:
    """Mean length of the brightness gradient, in steps of 255 a pixel: more for detail, and for noise."""
    grey_THW = luma(made_THWC)
    if min(grey_THW.shape[1:]) < 2:
        return {"sharpness": float("nan")}
    dy, dx = np.gradient(grey_THW, axis=(1, 2))
    return {"sharpness": float(np.hypot(dy, dx).mean())}


@metric("colour", groups=("quick", "full"), better=None)
def colour(made_THWC: np.ndarray, real_THWC: np.ndarray | None, sample: Sample) -> dict[str, float]:
    """Brightness, contrast (deviation of brightness within a frame) and colourfulness, each in steps of 255.

    Colourfulness is that of D. Hasler and S. Suesstrunk, "Measuring colourfulness in natural images", SPIE 5007 (2003).
    """
    red, green, blue = (made_THWC[..., c].astype(np.float64) for c in range(3))
    red_green, yellow_blue = red - green, 0.5 * (red + green) - blue
    spread = np.hypot(red_green.std((1, 2)), yellow_blue.std((1, 2)))
    middle = np.hypot(red_green.mean((1, 2)), yellow_blue.mean((1, 2)))
    grey_THW = luma(made_THWC)
    return {
        "brightness": float(grey_THW.mean()),
        "contrast": float(grey_THW.std((1, 2)).mean()),
        "colourfulness": float((spread + 0.3 * middle).mean()),
    }


def luma(frames_THWC: np.ndarray) -> np.ndarray:
    """Brightness `(T, H, W)`, 0 to 255 (ITU-R BT.601)."""
    return np.asarray(frames_THWC.astype(np.float64) @ np.array([0.299, 0.587, 0.114]))


def require_torchmetrics() -> None:
    """Raises Unavailable with the install line where torchmetrics is missing."""
    try:
        import torchmetrics  # noqa: F401
    except ImportError as error:
        raise Unavailable("needs torchmetrics (pip install -e '.[eval]')") from error


def _pictures(frames_THWC: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(frames_THWC)).permute(0, 3, 1, 2).float()


def _check(a: np.ndarray, b: np.ndarray) -> None:
    if a.shape != b.shape or a.dtype != np.uint8 or b.dtype != np.uint8 or not a.size:
        raise ValueError(f"need two uint8 arrays of one shape, got {a.dtype} {a.shape} and {b.dtype} {b.shape}")
