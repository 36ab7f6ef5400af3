"""The autoencoding loss: summed over pixels, the same however clips are packed, finite without a clip."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from sora_train.config.schema import VaeConfig
from sora_train.core.batch import Clip, Pack
from sora_train.core.cost import Geometry
from sora_train.methods.autoencoder.reconstruction import Reconstruction
from sora_train.models.video_vae.model import VideoVAE

CPU = torch.device("cpu")
CONFIG = VaeConfig(channels=4, patch=4, widths=[8, 8], blocks=[0, 1], strides=[[4, 1]])


@pytest.fixture
def task() -> Reconstruction:
    return Reconstruction(CONFIG, Geometry(4, 4, 1))


@pytest.fixture
def network() -> VideoVAE:
    torch.manual_seed(0)
    return VideoVAE(4, 4, [8, 8], [0, 1], [(4, 1)])


@pytest.fixture
def clips(make_clip: Callable[..., Clip]) -> list[Clip]:
    return [make_clip(size, seed) for seed, size in enumerate([(5, 8, 12), (5, 8, 12), (1, 16, 8)])]


def test_the_weight_is_the_number_of_pixels(task: Reconstruction, clips: list[Clip]) -> None:
    assert task.weight(Pack(clips)) == 2 * 5 * 8 * 12 + 16 * 8
    assert task.weight(Pack([])) == 0.0


def test_packing_does_not_change_the_loss_or_its_gradients(
    task: Reconstruction, network: VideoVAE, clips: list[Clip]
) -> None:
    gradients, losses = [], []
    for packs in ([clips], [[clip] for clip in clips]):
        network.zero_grad()
        parts = [task.loss(network, Pack(pack), CPU).sum for pack in packs]
        torch.stack(parts).sum().backward()
        losses.append(sum(part.item() for part in parts))
        gradients.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)


def test_the_loss_is_l1_and_squared_error_and_kl(task: Reconstruction, network: VideoVAE, clips: list[Clip]) -> None:
    clip = clips[2]
    noise = task._noise([clip.visit.seed], clip.visit.size, CPU)
    video = clip.video_TCHW.transpose(0, 1).unsqueeze(0).float() / 127.5 - 1
    ((decoded, mean, log_variance),) = network([video], [noise])
    error = decoded - video
    kl = -0.5 * (1 + log_variance - mean**2 - log_variance.exp())
    expected = error.abs().mean() + CONFIG.mse_weight * (error**2).mean() + CONFIG.kl_weight * kl.mean()
    assert task.loss(network, Pack([clip]), CPU).sum.item() == pytest.approx(16 * 8 * expected.item(), rel=1e-5)


def test_the_terms_add_up_and_have_the_same_names_without_clips(
    task: Reconstruction, network: VideoVAE, clips: list[Clip]
) -> None:
    loss, empty = (task.loss(network, Pack(part), CPU) for part in (clips, []))
    assert sum(loss.terms.values()).item() == pytest.approx(loss.sum.item(), rel=1e-6)
    assert list(loss.terms) == list(empty.terms) == ["l1", "mse", "kl"]
    assert not any(term.requires_grad for term in loss.terms.values())


def test_an_empty_pack_has_no_loss_and_reaches_every_weight(task: Reconstruction, network: VideoVAE) -> None:
    loss = task.loss(network, Pack([]), CPU).sum
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is not None and not p.grad.any() for p in network.parameters())
