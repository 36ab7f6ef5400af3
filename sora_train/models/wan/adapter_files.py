"""Reader of low-rank adapter files in the common naming schemes, and their use in a DiT."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from sora_train.config.released import adapter_file
from sora_train.config.schema import LoraConfig
from sora_train.core.cli import InputError
from sora_train.models.wan.convert import original_name, wan_name

_DOWN, _UP = ".lora_A.default.weight", ".lora_B.default.weight"  # as peft names A and B in a network

_PARTS = {"lora_A": "A", "lora_down": "A", "lora_B": "B", "lora_up": "B", "alpha": "alpha"}
_ADAPTER_KEY = re.compile(
    r"(?:transformer\.|diffusion_model\.|base_model\.model\.|lora_unet_)?(?P<layer>.+?)"
    r"\.(?P<part>lora_A|lora_B|lora_down|lora_up|alpha)(?:\.default)?(?:\.weight)?"
)


def add_to_weights(dit: nn.Module, path: str, factor: float) -> None:
    """Add the adapters of a file (or of a folder that `save_adapters` wrote), times `factor`, to a DiT's weights.

    Tensor names may be those of diffusers and peft, of Wan's own repository (`diffusion_model.`) or of kohya's scripts
    (`lora_unet_`). Raises InputError for other names, and for layers or shapes that the DiT doesn't have.
    """
    parameters = dict(dit.named_parameters())
    layers = _layers(parameters)
    for layer, (down, up, alpha) in read_adapters(path).items():
        name = layers.get(layer)
        if name is None:
            raise InputError(f"lora={path} adapts {layer}, which this model doesn't have")
        change = up.float() @ down.float()
        if change.shape != parameters[name].shape:
            shapes = f"{tuple(change.shape)} for {name} {tuple(parameters[name].shape)}"
            raise InputError(f"lora={path} is another model's: {shapes}")
        with torch.no_grad():
            scale = factor * (1.0 if alpha is None else alpha / len(down))
            parameters[name].add_(change.to(parameters[name]), alpha=scale)


def start_adapters(dit: nn.Module, path: str, lora: LoraConfig) -> None:
    """Set the adapters of a DiT to those of a file.

    Adapted layers that the file doesn't have keep their initial values.

    Args:
        dit: DiT with adapters.
        path: File, or folder that contains one. Its rank may be lower than that of the DiT's adapters.
        lora: Configuration of the DiT's adapters.

    Raises:
        InputError: The file has a higher rank, belongs to another model, or has layers that aren't adapted.
    """
    parameters = dict(dit.named_parameters())
    adapted = {name.removesuffix(_DOWN): p for name, p in parameters.items() if name.endswith(_DOWN)}
    layers = _layers(f"{name}.weight" for name in adapted)
    for layer, (down, up, alpha) in read_adapters(path).items():
        name = layers.get(layer, "").removesuffix(".weight")
        if not name:
            raise InputError(f"model.lora.init_from={path} adapts {layer}, which model.lora.targets leaves out")
        rank, a, b = len(down), adapted[name], parameters[name + _UP]
        if rank > lora.rank:
            raise InputError(f"model.lora.init_from={path} has rank {rank}; set model.lora.rank={rank} or higher")
        if down.shape[1] != a.shape[1] or up.shape[0] != b.shape[0]:
            raise InputError(f"model.lora.init_from={path} is another model's: {tuple(up.shape)} for {name}")
        factor = (1.0 if alpha is None else alpha / rank) * lora.rank / lora.alpha
        with torch.no_grad():
            a[:rank].copy_(down)
            b[:, :rank].copy_(up * factor)


def read_adapters(path: str) -> dict[str, tuple[Tensor, Tensor, float | None]]:
    """Read the adapters of a file.

    Returns:
        A, B and alpha by the layer's name in the file. The scale is alpha / rank, or 1 if alpha is None.

    Raises:
        InputError: The file can't be read, or has tensors that aren't a low-rank adapter's.
    """
    try:
        tensors = load_file(adapter_file(path))
    except (OSError, SafetensorError) as error:
        raise InputError(f"lora={path} can't be read as safetensors: {error}") from error
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        found = _ADAPTER_KEY.fullmatch(key)
        if found is None:
            raise InputError(f"lora={path} has {key}, which is no low-rank adapter's; only A, B and alpha are read")
        parts.setdefault(found["layer"], {})[_PARTS[found["part"]]] = tensor
    if wrong := next((layer for layer, part in parts.items() if not {"A", "B"} <= set(part)), None):
        raise InputError(f"lora={path} has half of an adapter for {wrong}")
    return {
        layer: (part["A"], part["B"], float(part["alpha"]) if "alpha" in part else None)
        for layer, part in parts.items()
    }


def _layers(parameters: Iterable[str]) -> dict[str, str]:
    """Map from the names that adapter files use for a layer to the name of its weight in our DiT."""
    return {alias: name for name in parameters if name.endswith(".weight") for alias in _aliases(name)}


def _aliases(name: str) -> list[str]:
    """Names that adapter files use for a layer of our DiT, from its weight's name; empty if Wan has no such layer."""
    try:
        theirs = wan_name(name).removesuffix(".weight")
    except KeyError:
        return []
    original = original_name(theirs)
    return [theirs, original, original.replace(".", "_")]
