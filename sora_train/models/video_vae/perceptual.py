"""LPIPS, a perceptual distance between pictures, with VGG16 weights in local files (Zhang et al. 2018, 1801.03924).

Activations of five layers are normalised over channels and compared. Squared differences are weighted by LPIPS's linear
heads if the files contain them, else by 1. Weights have the names of torchvision (`features.0.weight` ...) and of the
lpips package (`lin0.model.1.weight` ...).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from sora_train.core.cli import InputError

_WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))  # VGG16, max-pooling between levels
SMALLEST = 16  # smallest side in pixels; the last layers have a sixteenth of the resolution
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of ImageNet, for pixels in [-1, 1]


class Perceptual(nn.Module):
    """Frozen LPIPS network on the convolutions of VGG16."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        self.ends: list[int] = []  # layers whose output is compared
        inputs = 3
        for level in _WIDTHS:
            layers += [nn.MaxPool2d(2)] if layers else []
            for width in level:
                layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU()]
                inputs = width
            self.ends.append(len(layers) - 1)
        self.features = nn.Sequential(*layers)  # numbered as torchvision's
        self.heads = nn.ParameterList(torch.ones(level[-1]) for level in _WIDTHS)
        self.shift: Tensor
        self.scale: Tensor
        self.register_buffer("shift", torch.tensor(_SHIFT).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(_SCALE).view(3, 1, 1), persistent=False)
        self.requires_grad_(False)

    def load(self, files: Sequence[str]) -> Perceptual:
        """Load weights from .safetensors or torch.save files. Raises InputError if VGG16 weights are missing."""
        found: dict[str, Tensor] = {}
        for file in files:
            found |= _read(Path(file))
        convolutions = {f"features.{name}": p for name, p in self.features.named_parameters()}
        wrong = [n for n, p in convolutions.items() if n not in found or found[n].shape != p.shape]
        if wrong:
            raise InputError(
                f"vae.perceptual.files={list(files)} lack {len(wrong)} of VGG16's {len(convolutions)} tensors, the "
                f"first is {wrong[0]}; give torchvision's vgg16 weights"
            )
        for name, p in convolutions.items():
            p.copy_(found[name])
        heads = [
            found.get(f"lin{n}.model.1.weight", found.get(f"lins.{n}.model.1.weight")) for n in range(len(self.ends))
        ]
        for mine, theirs in zip(self.heads, heads, strict=True):
            if any(head is None for head in heads) and any(head is not None for head in heads):
                raise InputError(f"vae.perceptual.files={list(files)} have some of LPIPS's five heads and not others")
            if theirs is not None:
                mine.copy_(theirs.flatten())
        return self

    def forward(self, a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
        """Distance of each pair of pictures in [-1, 1], `(B,)`; gradients flow to both."""
        if min(a_BCHW.shape[-2:]) < SMALLEST:
            raise InputError(
                f"vae.perceptual can't compare pictures of {a_BCHW.shape[-2]}x{a_BCHW.shape[-1]}; their sides must be "
                f"{SMALLEST} pixels or more: raise data.max_pixels, or set vae.perceptual.weight=0"
            )
        x = (torch.cat((a_BCHW, b_BCHW)) - self.shift) / self.scale
        total = x.new_zeros(len(a_BCHW))
        heads = iter(self.heads)
        for number, layer in enumerate(self.features):
            x = layer(x)
            if number in self.ends:
                a, b = F.normalize(x, dim=1, eps=1e-10).chunk(2)
                total = total + ((a - b).square() * next(heads).view(-1, 1, 1)).sum(1).mean((1, 2))
        return total


def _read(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise InputError(f"vae.perceptual.files: there is no {file}; give a local file of VGG16 weights")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        return dict(torch.load(file, map_location="cpu", weights_only=True))
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError, TypeError, ValueError) as error:
        raise InputError(f"vae.perceptual.files: {file} holds no weights: {str(error).splitlines()[0]}") from error
