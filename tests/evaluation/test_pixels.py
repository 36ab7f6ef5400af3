"""PSNR and SSIM against values worked out by hand."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from sora_train.evaluation.metric import METRICS, Sample
from sora_train.evaluation.pixels import luma, psnr, ssim
from sora_train.evaluation.registry import choose  # noqa: F401  (registers the metrics)
from sora_train.evaluation.remembered import remembered

A = np.full((2, 16, 16, 3), 100, np.uint8)


def test_psnr_of_a_known_error() -> None:
    assert psnr(A, A + np.uint8(5)) == pytest.approx(34.1514, abs=1e-4)  # 20 log10(255 / 5)
    assert psnr(A + np.uint8(5), A) == pytest.approx(34.1514, abs=1e-4)  # no wrap-around below zero
    assert psnr(A, A) == float("inf")


def test_ssim_of_flat_frames_is_the_luminance_term() -> None:
    c1 = (0.01 * 255) ** 2
    assert ssim(A, A) == pytest.approx(1.0)
    assert ssim(A, A // 2) == pytest.approx((2 * 100 * 50 + c1) / (100**2 + 50**2 + c1), abs=1e-3)


@pytest.mark.parametrize("shape", [(3, 40, 53, 3), (2, 11, 12, 3), (1, 64, 48, 1)])
def test_ssim_equals_torchmetrics(shape: tuple[int, ...]) -> None:
    torchmetrics = pytest.importorskip("torchmetrics.functional.image")
    rng = np.random.default_rng(1)
    one = gaussian_filter(rng.normal(0, 300, shape), (0, 2, 2, 0)) + 128
    for noise in (0, 4, 40):
        a, b = (np.clip(x + rng.normal(0, noise, shape), 0, 255).astype(np.uint8) for x in (one, one))
        theirs = [torch.from_numpy(x).permute(0, 3, 1, 2).float() for x in (a, b)]
        wanted = torchmetrics.structural_similarity_index_measure(*theirs, data_range=255.0)
        assert ssim(a, b) == pytest.approx(float(wanted), abs=1e-5)
        wanted = torchmetrics.peak_signal_noise_ratio(*theirs, data_range=255.0)
        assert not noise or psnr(a, b) == pytest.approx(float(wanted), abs=1e-4)


def test_figures_equal_their_definitions() -> None:
    """Worked out once in single precision and frame by frame, they are those of plain double precision."""
    video = np.random.default_rng(2).integers(0, 256, (6, 21, 34, 3), dtype=np.uint8)
    grey = video.astype(np.float64) @ np.array([0.299, 0.587, 0.114])
    dy, dx = np.gradient(grey, axis=(1, 2))
    length = float(np.hypot(dy, dx).mean())
    first, second = (float(np.abs(np.diff(grey, n=n, axis=0)).mean()) for n in (1, 2))
    sample = Sample("a", fps=8.0)
    for name, wanted in {
        "sharpness": {"sharpness": length}, "flicker": {"flicker": second}, "jerk": {"jerk": second / first},
        "motion": {"motion": first / length / 21 * 8.0},
    }.items():  # fmt: skip
        judged = METRICS[name].build({}).figures(video, None, sample)
        assert judged == pytest.approx(wanted, rel=1e-5), name
    assert luma(video) == pytest.approx(grey, abs=1e-3)


def test_what_is_remembered_is_of_the_very_array() -> None:
    asked: list[int] = []

    @remembered
    def total(array: np.ndarray) -> int:
        asked.append(id(array))
        return int(array.sum())

    one, other = np.ones(3), np.ones(4)
    assert [total(one), total(one), total(other), total(one.copy())] == [3, 3, 4, 3] and len(asked) == 3
    assert [total(np.full(2, n)) for n in range(9)] == [2 * n for n in range(9)], "though ids come again"


def test_ssim_falls_with_noise() -> None:
    rng = np.random.default_rng(0)
    clean = np.broadcast_to(np.linspace(0, 255, 32, dtype=np.uint8)[None, :, None, None], (2, 32, 32, 3)).copy()
    little, much = (np.clip(clean + rng.normal(0, s, clean.shape), 0, 255).astype(np.uint8) for s in (5, 60))
    assert 1 > ssim(clean, little) > ssim(clean, much) > 0


def test_wrong_input_is_refused() -> None:
    with pytest.raises(ValueError, match="one shape"):
        psnr(A, A[:1])
    with pytest.raises(ValueError, match="uint8"):
        psnr(A, A.astype(np.float32))
    with pytest.raises(ValueError, match="11 pixels"):
        ssim(A[:, :8], A[:, :8])
