"""The video autoencoder: causal to the bit, 1 + k * stride frames to 1 + k, and wrong sizes are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sora_train.models.video_vae.model import Down, Up, VideoVAE, fold, regroup, unfold
from sora_train.models.video_vae.tiling import in_time, tiled

SHAPES: dict[str, dict[str, Any]] = {
    "demo": {"channels": 6, "patch": 4, "widths": [8, 16], "blocks": [1, 1], "strides": [(4, 1)]},
    "base": {"channels": 4, "patch": 2, "widths": [8, 8, 16], "blocks": [1, 1, 1], "strides": [(2, 2), (2, 2)]},
    "space only": {"channels": 4, "patch": 1, "widths": [8, 8], "blocks": [1, 0], "strides": [(1, 2)]},
}


def make_vae(name: str) -> VideoVAE:
    torch.manual_seed(0)
    vae = VideoVAE(**SHAPES[name])
    with torch.no_grad():
        for p in vae.parameters():  # wake the layers that start as the identity
            p.add_(0.05 * torch.randn_like(p))
    return vae.eval()


@pytest.mark.parametrize(("name", "strides"), [("demo", (4, 4)), ("base", (4, 8)), ("space only", (1, 2))])
@pytest.mark.parametrize("k", [0, 1, 3])
@torch.no_grad()
def test_frames_and_sides_shrink_by_the_strides_and_come_back(name: str, strides: tuple[int, int], k: int) -> None:
    vae, (time, space) = make_vae(name), strides
    assert (vae.temporal_stride, vae.spatial_stride) == strides
    video = torch.randn(2, 3, 1 + k * time, 2 * space, 3 * space)
    mean, log_variance = vae.encode(video)
    assert mean.shape == log_variance.shape == (2, vae.channels, 1 + k, 2, 3)
    assert vae.decode(mean).shape == video.shape


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_a_later_frame_changes_no_bit_of_earlier_latents(name: str) -> None:
    vae = make_vae(name)
    stride = vae.temporal_stride
    video = torch.randn(1, 3, 1 + 3 * stride, 16, 16)
    before = torch.cat(vae.encode(video), 1)
    for first in range(1, video.shape[2]):  # frames from `first` on are replaced
        later = video.clone()
        later[:, :, first:] = torch.randn_like(later[:, :, first:])
        after = torch.cat(vae.encode(later), 1)
        untouched = 1 + (first - 1) // stride
        assert torch.equal(after[:, :, :untouched], before[:, :, :untouched])
        assert not torch.equal(after[:, :, untouched], before[:, :, untouched])


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_a_later_latent_changes_no_bit_of_earlier_frames(name: str) -> None:
    vae = make_vae(name)
    latents = torch.randn(1, vae.channels, 4, 4, 4)
    before = vae.decode(latents)
    for k in range(1, 4):
        later = latents.clone()
        later[:, :, k:] += 1.0
        frames = 1 + (k - 1) * vae.temporal_stride
        assert torch.equal(vae.decode(later)[:, :, :frames], before[:, :, :frames])


@pytest.mark.parametrize("size", [(4, 16, 16), (2, 16, 16), (5, 18, 16), (5, 16, 10)])
def test_sizes_off_the_grid_are_refused(size: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match=f"{size[0]} frames, {size[1]}x{size[2]}"):
        make_vae("demo").encode(torch.zeros(1, 3, *size))


@pytest.mark.parametrize(("time", "space"), [(4, 1), (2, 2), (1, 3)])
def test_unfold_is_the_inverse_of_fold(time: int, space: int) -> None:
    x = torch.randn(2, 3, 2 * time, 2 * space, 4 * space)
    folded = fold(x, time, space)
    assert folded.shape == (2, 3 * time * space**2, 2, 2, 4)
    assert torch.equal(unfold(folded, time, space), x)
    assert folded[0, :, 0, 0, 0].tolist() == x[0, :, :time, :space, :space].flatten().tolist()


def test_regroup_averages_or_repeats_neighbours() -> None:
    x = torch.arange(4.0).view(1, 4, 1, 1, 1)
    assert regroup(x, 2).flatten().tolist() == [0.5, 2.5]
    assert regroup(x, 8).flatten().tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert regroup(x, 4).flatten().tolist() == [0, 1, 2, 3]
    assert regroup(torch.arange(6.0).view(1, 6, 1, 1, 1), 4).flatten().tolist() == pytest.approx(
        [1 / 3, 5 / 3, 10 / 3, 14 / 3]
    )


@torch.no_grad()
def test_down_and_up_keep_a_constant_video_constant() -> None:
    down, up = Down(4, 4, 2, 2), Up(4, 4, 2, 2)
    for layer in (down, up):
        layer.conv.weight.zero_()
    video = torch.full((1, 4, 5, 4, 4), 0.7)
    small = down(video)
    assert small.shape == (1, 4, 3, 2, 2)
    torch.testing.assert_close(small, torch.full_like(small, 0.7))
    torch.testing.assert_close(up(small), video)


def test_normalising_is_undone_by_denormalising() -> None:
    vae = make_vae("demo")
    vae.latents_mean.copy_(torch.arange(6.0))
    vae.latents_std.copy_(torch.arange(1.0, 7.0))
    latents = torch.randn(2, 6, 3, 4, 4)
    torch.testing.assert_close(vae.denormalise(vae.normalise(latents)), latents)
    assert vae.normalise(vae.latents_mean.view(1, 6, 1, 1, 1)).abs().max() == 0
    assert {"latents_mean", "latents_std"} <= vae.state_dict().keys()


def test_forward_takes_batches_of_several_sizes_and_samples_by_the_given_noise() -> None:
    vae = make_vae("demo")
    videos = [torch.randn(2, 3, 5, 8, 8), torch.randn(1, 3, 1, 12, 8)]
    none = [torch.zeros(2, 6, 2, 2, 2), torch.zeros(1, 6, 1, 3, 2)]
    quiet, loud = vae(videos, none), vae(videos, [noise + 1 for noise in none])
    for video, (decoded, mean, _), (moved, _, _) in zip(videos, quiet, loud, strict=True):
        assert decoded.shape == video.shape
        torch.testing.assert_close(decoded, vae.decode(mean))
        assert not torch.allclose(decoded, moved)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_a_video_in_pieces_is_the_whole_video(name: str, size: int) -> None:
    vae = make_vae(name)
    stride, side = vae.temporal_stride, 2 * vae.spatial_stride
    video = torch.randn(1, 3, 1 + 5 * stride, side, side)
    mean, log_variance = vae.encode(video)
    for _ in range(2):  # nothing is remembered from one video to the next
        parts = list(vae.encode_pieces(in_time(video, 1 + stride, size * stride)))
        torch.testing.assert_close(torch.cat([m for m, _ in parts], 2), mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.cat([v for _, v in parts], 2), log_variance, rtol=1e-5, atol=1e-5)
        pixels = torch.cat(list(vae.decode_pieces(in_time(mean, size, size))), 2)
        torch.testing.assert_close(pixels, vae.decode(mean), rtol=1e-5, atol=1e-5)
    assert torch.equal(vae.encode(video)[0], mean)


@torch.no_grad()
def test_tiles_with_enough_around_them_are_the_whole_picture() -> None:
    vae = make_vae("demo")  # looks 7 latent pixels sideways at most
    video = torch.randn(1, 3, 5, 64, 48)
    mean = vae.encode(video)[0]
    for overlap, bound in ((7, 1e-5), (2, 0.2)):
        tiles = tiled(lambda x: vae.encode(x)[0], video, 16, 4 * overlap, 0.25)
        assert (tiles - mean).abs().max() <= bound * mean.abs().max()
        decoded = vae.decode(mean)
        tiles = tiled(vae.decode, mean, 4, overlap, 4)
        assert tiles.shape == decoded.shape
        assert (tiles - decoded).abs().max() <= bound * decoded.abs().max()
    assert not torch.allclose(tiled(vae.decode, mean, 4, 0, 4), decoded, atol=1e-3), "without any the seams show"
