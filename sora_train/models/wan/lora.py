"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685): beside frozen linear layers, or added to their weights.

An adapted layer computes W x + alpha / rank B A x. A is random and B zero at the start, so that nothing is changed;
A and B are all that is trained, kept in checkpoints, averaged and given away.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sora_train.config.schema import LoraConfig, ModelConfig
from sora_train.core.cli import InputError
from sora_train.models.wan.convert import require_wan, wan_name

_DOWN, _UP = ".lora_A.default.weight", ".lora_B.default.weight"  # A and B, as peft names them in the network
_FILE = "pytorch_lora_weights.safetensors"  # where diffusers and peft look
_PARTS = {"lora_A": "A", "lora_down": "A", "lora_B": "B", "lora_up": "B", "alpha": "alpha"}
_ADAPTER_KEY = re.compile(
    r"(?:transformer\.|diffusion_model\.|base_model\.model\.|lora_unet_)?(?P<layer>.+?)"
    r"\.(?P<part>lora_A|lora_B|lora_down|lora_up|alpha)(?:\.default)?(?:\.weight)?"
)
_ORIGINAL: dict[str, str | Callable[[re.Match[str]], str]] = {  # names of diffusers to those of Wan's own repository
    r"\battn1\.": "self_attn.", r"\battn2\.": "cross_attn.", r"\bto_([qkv])$": r"\1", r"\bto_out\.0$": "o",
    r"\bffn\.net\.0\.proj$": "ffn.0", r"\bffn\.net\.2$": "ffn.2",
    r"^condition_embedder\.text_embedder\.linear_([12])$": lambda m: f"text_embedding.{2 * (int(m[1]) - 1)}",
    r"^condition_embedder\.time_embedder\.linear_([12])$": lambda m: f"time_embedding.{2 * (int(m[1]) - 1)}",
    r"^condition_embedder\.time_proj$": "time_projection.1", r"^proj_out$": "head.head",
}  # fmt: skip


def targeted(network: nn.Module, targets: Sequence[str]) -> list[str]:
    """Names of the linear layers that `targets` name by their ends, whole parts only (`q`, `self_attention.q`)."""
    ends = tuple(f".{target}" for target in targets)
    return [
        name for name, layer in network.named_modules() if isinstance(layer, nn.Linear) and f".{name}".endswith(ends)
    ]


def add_adapters(network: nn.Module, dit: nn.Module, lora: LoraConfig) -> None:
    """Freeze `network` and put adapters into the layers of its part `dit`; A is drawn from the default generator.

    Raises InputError where peft isn't installed.
    """
    try:
        from peft import LoraConfig as PeftConfig  # takes seconds to import
        from peft import inject_adapter_in_model
    except ImportError as error:
        raise InputError(f"model.lora needs peft ({error}); pip install -e '.[models]'") from error
    network.requires_grad_(False)
    names = targeted(dit, lora.targets)
    inject_adapter_in_model(PeftConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=names), dit)
    trained = {name for name, p in dit.named_parameters() if p.requires_grad}
    if trained != {name + part for name in names for part in (_DOWN, _UP)}:
        raise RuntimeError("peft adapted other layers than it was told to")


class Outline(nn.Module):
    """Computes and keeps what peft's adapted layer does; for planning, where tensors have no memory."""

    def __init__(self, base: nn.Linear, lora: LoraConfig) -> None:
        super().__init__()
        self.base, self.factor = base, lora.alpha / lora.rank
        self.down = nn.Linear(base.in_features, lora.rank, bias=False)
        self.up = nn.Linear(lora.rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """W x + alpha / rank B A x."""
        return self.base(x) + self.up(self.down(x)) * self.factor


def add_outlines(network: nn.Module, dit: nn.Module, lora: LoraConfig) -> None:
    """Freeze `network` and put outlines of adapters into the layers of its part `dit`."""
    network.requires_grad_(False)
    for name in targeted(dit, lora.targets):
        owner, _, part = name.rpartition(".")
        setattr(dit.get_submodule(owner), part, Outline(dit.get_submodule(name), lora))  # type: ignore[arg-type]


def merge(weights: Mapping[str, Tensor], adapters: Mapping[str, Tensor], lora: LoraConfig) -> dict[str, Tensor]:
    """Weights of the network without adapters that computes the same: each W becomes W + alpha / rank B A."""
    merged = dict(weights)
    for name, down, up in _pairs(adapters):
        merged[f"{name}.weight"] = torch.addmm(weights[f"{name}.weight"], up, down, alpha=lora.alpha / lora.rank)
    return merged


def save_adapters(adapters: Mapping[str, Tensor], model: ModelConfig, folder: Path) -> None:
    """Write the adapters of a DiT as a file that diffusers' `load_lora_weights` and `load_lora_adapter` read.

    The factor alpha / rank is multiplied into B, so that it is 1 for every reader, whatever it knows of alpha.
    Raises InputError for a model with options that Wan doesn't have.
    """
    require_wan(model, "adapter")
    factor = model.lora.alpha / model.lora.rank
    theirs: dict[str, Tensor] = {}
    for name, down, up in _pairs(adapters):
        layer = "transformer." + wan_name(f"{name}.weight").removesuffix(".weight")
        theirs |= {f"{layer}.lora_A.weight": down.contiguous(), f"{layer}.lora_B.weight": up * factor}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(theirs, folder / _FILE, metadata={"format": "pt"})


def add_to_weights(dit: nn.Module, path: str, factor: float) -> None:
    """Add the adapters of a file (or of a folder that `save_adapters` wrote), times `factor`, to a DiT's weights.

    Read are the names of diffusers and peft, those of Wan's own repository (`diffusion_model.`), and kohya's
    (`lora_unet_`). Raises InputError for another file, and for layers or shapes that the DiT doesn't have.
    """
    parameters = dict(dit.named_parameters())
    layers = {alias: name for name in parameters if name.endswith(".weight") for alias in _aliases(name)}
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


def adapter_file(path: str) -> Path:
    """The file of adapters that a path names: itself, or the one in a folder."""
    return Path(path) / _FILE if Path(path).is_dir() else Path(path)


def read_adapters(path: str) -> dict[str, tuple[Tensor, Tensor, float | None]]:
    """A, B and alpha (None: the factor is 1) of each adapted layer in a file, by the layer's name there."""
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


def _aliases(name: str) -> list[str]:
    """What files of adapters call a layer of our DiT."""
    try:
        theirs = wan_name(name).removesuffix(".weight")
    except KeyError:
        return []
    original = theirs
    for ours, its in _ORIGINAL.items():
        original = re.sub(ours, its, original)
    return [theirs, original, original.replace(".", "_")]


def _pairs(adapters: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name of the adapted layer, A and B, of each adapter."""
    for key, down in adapters.items():
        if key.endswith(_DOWN):
            name = key.removesuffix(_DOWN)
            yield name, down, adapters[name + _UP]
