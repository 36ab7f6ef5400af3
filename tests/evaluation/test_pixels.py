"""PSNR and SSIM against values worked out by hand."""

import numpy as np
import pytest

from sora_train.evaluation.pixels import psnr, ssim

A = np.full((2, 16, 16, 3), 100, np.uint8)


def test_psnr_of_a_known_error() -> None:
    assert psnr(A, A + np.uint8(5)) == pytest.approx(34.1514, abs=1e-4)  # 20 log10(255 / 5)
    assert psnr(A + np.uint8(5), A) == pytest.approx(34.1514, abs=1e-4)  # no wrap-around below zero
    assert psnr(A, A) == float("inf")


def test_ssim_of_flat_frames_is_the_luminance_term() -> None:
    c1 = (0.01 * 255) ** 2
    assert ssim(A, A) == pytest.approx(1.0)
    assert ssim(A, A // 2) == pytest.approx((2 * 100 * 50 + c1) / (100**2 + 50**2 + c1), abs=1e-3)


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
