"""The perceptual distance by its formula, its weights from local files, and what it adds to the autoencoder's loss."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from safetensors.torch import save_file
from torch import Tensor

from sora_train.config.load import build
from sora_train.config.schema import PerceptualConfig, VaeConfig
from sora_train.core.batch import Clip, Pack
from sora_train.core.cli import InputError
from sora_train.core.cost import Geometry
from sora_train.methods.autoencoder.learner import start
from sora_train.methods.autoencoder.reconstruction import Reconstruction
from sora_train.models.video_vae.model import VideoVAE
from sora_train.models.video_vae.perceptual import Perceptual

CPU = torch.device("cpu")
WIDTHS = [64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool", 512, 512, 512, "pool", 512, 512, 512]
COMPARED = (1, 4, 8, 12, 16)  # places in WIDTHS: the last convolution before each pooling, and the last of all


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return random_vgg()


def random_vgg() -> dict[str, Tensor]:
    """VGG16's tensors by torchvision's names, its classifier's first bias, and heads by lpips's names."""
    torch.manual_seed(0)
    found, place, inputs = {}, 0, 3
    for width in WIDTHS:
        if width == "pool":
            place += 1
            continue
        found[f"features.{place}.weight"] = torch.randn(width, inputs, 3, 3) * (2 / (9 * inputs)) ** 0.5
        found[f"features.{place}.bias"] = 0.1 * torch.randn(width)
        place, inputs = place + 2, width
    for n, width in enumerate((64, 128, 256, 512, 512)):
        found[f"lin{n}.model.1.weight"] = torch.rand(1, width, 1, 1)
    return {**found, "classifier.0.bias": torch.zeros(4)}


@pytest.fixture(scope="module")
def files(weights: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The network as torch.save writes it, the heads as safetensors."""
    folder = tmp_path_factory.mktemp("vgg")
    heads = {n: w for n, w in weights.items() if n.startswith("lin")}
    torch.save({n: w for n, w in weights.items() if n not in heads}, folder / "vgg16.pth")
    save_file(heads, folder / "heads.safetensors")
    return str(folder / "vgg16.pth"), str(folder / "heads.safetensors")


def by_formula(weights: dict[str, Tensor], a: Tensor, b: Tensor, heads: bool) -> Tensor:
    """Zhang et al. 2018, equation 1, one picture after the other."""
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    levels = []
    for picture in (a, b):
        x, place, seen = ((picture + 1) / 2 - mean) / std, 0, []
        for n, width in enumerate(WIDTHS):
            if width == "pool":
                x, place = F.max_pool2d(x, 2), place + 1
                continue
            x = F.conv2d(x, weights[f"features.{place}.weight"], weights[f"features.{place}.bias"], padding=1).relu()
            place += 2
            if n in COMPARED:
                seen.append(x / x.norm(dim=0, keepdim=True).clamp(min=1e-10))
        levels.append(seen)
    total = torch.zeros(())
    for n, (one, other) in enumerate(zip(*levels, strict=True)):
        w = weights[f"lin{n}.model.1.weight"].view(-1, 1, 1) if heads else 1.0
        total = total + (w * (one - other) ** 2).sum(0).mean()
    return total


@pytest.mark.parametrize("heads", [True, False])
def test_it_is_lpips(weights: dict[str, Tensor], files: tuple[str, str], heads: bool) -> None:
    distance = Perceptual().load(files if heads else files[:1])
    a, b = (torch.rand(2, 3, 16, 24) * 2 - 1 for _ in range(2))
    expected = torch.stack([by_formula(weights, *pair, heads) for pair in zip(a, b, strict=True)])
    # the published shift and scale are rounded to three digits
    torch.testing.assert_close(distance(a, b), expected, rtol=0.02, atol=0.0)
    torch.testing.assert_close(distance(a, b), distance(b, a))
    assert distance(a, a).tolist() == [0.0, 0.0] and distance(a, b).min() > 0.01


def test_what_lacks_is_said_in_one_line(weights: dict[str, Tensor], files: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "garbage.pth").write_bytes(b"no weights")
    (tmp_path / "garbage.safetensors").write_bytes(b"no weights")
    save_file({"lin0.model.1.weight": weights["lin0.model.1.weight"]}, tmp_path / "one.safetensors")
    save_file({"features.0.weight": weights["features.0.weight"]}, tmp_path / "little.safetensors")
    for given, message in (
        ([str(tmp_path / "none.pth")], "there is no"),
        ([str(tmp_path / "garbage.pth")], "holds no weights"),
        ([str(tmp_path / "garbage.safetensors")], "holds no weights"),
        ([str(tmp_path / "little.safetensors")], "lack 25 of VGG16's 26 tensors, the first is features.0.bias"),
        ([files[0], str(tmp_path / "one.safetensors")], "some of LPIPS's five heads"),
    ):
        with pytest.raises(InputError, match=message) as raised:
            Perceptual().load(given)
        assert "\n" not in str(raised.value)
    with pytest.raises(InputError, match="8x32; their sides must be 16"):
        Perceptual()(torch.zeros(1, 3, 8, 32), torch.zeros(1, 3, 8, 32))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("vae.perceptual.weight=0.1",), "needs VGG16 weights; give vae.perceptual.files"),
        (("vae.perceptual.weight=-1", "vae.perceptual.files=[a]"), "must not be below 0"),
    ],
)
def test_wrong_keys_are_answered(
    compose_tree: Callable[..., DictConfig], overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        build(compose_tree("experiment=demo_vae", *overrides))


def test_it_joins_the_loss_of_the_autoencoder_and_stays_as_it_is(
    compose_tree: Callable[..., DictConfig], files: tuple[str, str], make_clip: Callable[..., Clip]
) -> None:
    config = VaeConfig(
        channels=4, widths=[8, 8], strides=[[4, 1]], perceptual=PerceptualConfig(0.5), patch=4, blocks=[0, 2]
    )
    torch.manual_seed(0)
    network, geometry = VideoVAE(4, 4, [8, 8], [0, 1], [(4, 1)]), Geometry(4, 4, 1)
    seeing = Perceptual().load(files)
    clip = make_clip((5, 16, 16), 1)
    video = clip.video_TCHW.float() / 127.5 - 1
    task, plain = Reconstruction(config, geometry, seeing), Reconstruction(config, geometry)
    noise = [task._noise([clip.visit.seed], clip.visit.size, CPU)]
    ((decoded, _, _),) = network([video.transpose(0, 1).unsqueeze(0)], noise)
    expected = 5 * 16 * 16 * 0.5 * seeing(decoded[0].transpose(0, 1), video).mean()
    both = [t.loss(network, Pack([clip]), CPU).sum for t in (task, plain)]
    assert (both[0] - both[1]).item() == pytest.approx(expected.item(), rel=1e-3)
    both[0].backward()
    assert all(p.grad is not None for p in network.parameters()) and all(p.grad is None for p in seeing.parameters())
    keys = (f"vae.perceptual.files=[{','.join(files)}]", "vae.perceptual.weight=0.5")
    made = start(build(compose_tree("experiment=demo_vae", *keys)), CPU)
    assert made.objective.perceptual is not None and not made.networks["perceptual"].trained
    assert not any("features" in name for name, _ in made.networks["vae"].module.named_parameters()), (
        "it is no part of the VAE"
    )
