"""Measures of pixels: similarity of two videos, sharpness, and colours."""

from __future__ import annotations

import numpy as np

from sora_train.evaluation.metric import Metric, Models, Sample, Unavailable, metric, register
from sora_train.evaluation.remembered import remembered

_SSIM_SIDE, _SSIM_SIGMA = 11, 1.5  # window in pixels, and the standard deviation of its Gaussian
_SSIM_FLOORS = (0.01 * 255) ** 2, (0.03 * 255) ** 2


@metric("psnr", groups=("quick", "full"), better="up", needs=["real"], summary="median")
def psnr_figures(made_THWC: np.ndarray, real_THWC: np.ndarray | None, sample: Sample) -> dict[str, float]:
    """PSNR against the real video, in dB."""
    assert real_THWC is not None
    return {"psnr_db": psnr(made_THWC, real_THWC)}


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 arrays of the same shape; `inf` if they are equal.

    10 log10(255^2 / MSE), where the MSE is the mean over the complete array, not a mean of per-frame values (ITU-T
    J.340). Raises ValueError for other types, or shapes that differ.
    """
    _check(a, b)
    squares = 0.0
    for one, other in zip(a, b, strict=True):  # frame by frame, so that the data stays in the CPU cache
        difference = np.subtract(one, other, dtype=np.int16).astype(np.float32).ravel()
        squares += float(np.dot(difference, difference))
    return float("inf") if squares == 0 else float(10 * np.log10(255.0**2 * a.size / squares))


def ssim(a_THWC: np.ndarray, b_THWC: np.ndarray) -> float:
    """Mean structural similarity of the frames of two uint8 videos `(T, H, W, C)`; 1 if they are equal.

    Z. Wang et al., "Image quality assessment: from error visibility to structural similarity", IEEE TIP 13 (2004),
    with a Gaussian window of 11 pixels, per channel, mirrored at the borders. Raises ValueError for other types or
    shapes, or frames with a side under 11 pixels.
    """
    _check(a_THWC, b_THWC)
    if a_THWC.ndim != 4 or min(a_THWC.shape[1:3]) < _SSIM_SIDE:
        raise ValueError(f"need videos (T, H, W, C) with sides of 11 pixels or more, got {a_THWC.shape}")
    frames = zip(a_THWC, b_THWC, strict=True)
    planes = [(a[..., channel], b[..., channel]) for a, b in frames for channel in range(a.shape[-1])]
    return float(np.mean([_ssim_of_planes(a, b) for a, b in planes]))


def _ssim_of_planes(a_HW: np.ndarray, b_HW: np.ndarray) -> float:
    import cv2

    def blurred(x: np.ndarray) -> np.ndarray:
        return cv2.GaussianBlur(x, (_SSIM_SIDE, _SSIM_SIDE), _SSIM_SIGMA, borderType=cv2.BORDER_REFLECT_101)

    # in place if a plane isn't needed any more: freeing and allocating memory costs as much as the arithmetic
    a, b = a_HW.astype(np.float32), b_HW.astype(np.float32)
    mean_a, mean_b = blurred(a), blurred(b)
    covariance = blurred(a * b)
    a *= a
    b *= b
    a += b
    variances = blurred(a)
    product = np.multiply(mean_a, mean_b, out=b)
    mean_a *= mean_a
    mean_b *= mean_b
    squares = np.add(mean_a, mean_b, out=mean_a)
    covariance -= product
    variances -= squares
    np.maximum(variances, 0, out=variances)
    luminance, structure = _SSIM_FLOORS
    for plane, factor, floor in ((product, 2, luminance), (covariance, 2, structure), (squares, 1, luminance)):
        plane *= factor
        plane += floor
    variances += structure
    product *= covariance
    squares *= variances
    product /= squares
    return float(product.mean(dtype=np.float64))


def _build_ssim(models: Models) -> Metric:
    require_opencv()

    def figures(made_THWC: np.ndarray, real_THWC: np.ndarray | None, sample: Sample) -> dict[str, float]:
        assert real_THWC is not None
        small = min(made_THWC.shape[1:3]) < _SSIM_SIDE
        return {"ssim": float("nan") if small else ssim(made_THWC, real_THWC)}

    return Metric("ssim", figures, "up", frozenset({"real"}))


register("ssim", ("quick", "full"), _build_ssim)


@metric("sharpness", groups=("quick", "full"), better=None)
def sharpness(made_THWC: np.ndarray, real_THWC: np.ndarray | None, sample: Sample) -> dict[str, float]:
    """Mean length of the brightness gradient per pixel, on a scale of 0 to 255; detail and noise increase it."""
    return {"sharpness": edges(made_THWC) if min(made_THWC.shape[1:3]) > 1 else float("nan")}


@metric("colour", groups=("quick", "full"), better=None)
def colour(made_THWC: np.ndarray, real_THWC: np.ndarray | None, sample: Sample) -> dict[str, float]:
    """Brightness, contrast (standard deviation of brightness within a frame), colourfulness; on a scale of 0 to 255.

    Colourfulness is that of D. Hasler and S. Suesstrunk, "Measuring colourfulness in natural images", SPIE 5007 (2003).
    """
    return {
        "brightness": float(luma(made_THWC).mean(dtype=np.float64)),
        "contrast": float(np.mean([grey_HW.std(dtype=np.float64) for grey_HW in luma(made_THWC)])),
        "colourfulness": float(np.mean([_colourfulness(frame) for frame in made_THWC])),
    }


def _colourfulness(frame_HWC: np.ndarray) -> float:
    red, green, blue = (frame_HWC[..., c].astype(np.float32) for c in range(3))
    pair = red - green, np.float32(0.5) * (red + green) - blue
    means = [float(one.mean(dtype=np.float64)) for one in pair]
    deviations = [float(np.dot(x, x)) / x.size for x in ((p - m).ravel() for p, m in zip(pair, means, strict=True))]
    return sum(deviations) ** 0.5 + 0.3 * float(np.hypot(means[0], means[1]))


@remembered
def luma(frames_THWC: np.ndarray) -> np.ndarray:
    """Brightness `(T, H, W)`, 0 to 255 (ITU-R BT.601)."""
    grey_THW = frames_THWC[..., 0] * np.float32(0.299)
    for channel, weight in ((1, 0.587), (2, 0.114)):
        grey_THW += frames_THWC[..., channel] * np.float32(weight)
    return grey_THW


@remembered
def edges(frames_THWC: np.ndarray) -> float:
    """Mean length of the brightness gradient per pixel; frames must have two pixels a side or more."""
    sums = 0.0
    for grey_HW in luma(frames_THWC):
        dy, dx = np.gradient(grey_HW)
        sums += float(np.sqrt(dy * dy + dx * dx).mean(dtype=np.float64))
    return sums / len(frames_THWC)


def require_opencv() -> None:
    """Raise Unavailable with the install command if OpenCV is missing."""
    try:
        import cv2  # noqa: F401
    except ImportError as error:
        raise Unavailable("needs OpenCV (pip install -e '.[eval]')") from error


def _check(a: np.ndarray, b: np.ndarray) -> None:
    if a.shape != b.shape or a.dtype != np.uint8 or b.dtype != np.uint8 or not a.size:
        raise ValueError(f"need two uint8 arrays of one shape, got {a.dtype} {a.shape} and {b.dtype} {b.shape}")
