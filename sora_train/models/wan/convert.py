"""Conversion between our DiT and diffusers' `WanTransformer3DModel` (or Wan's own `WanModel`), in both directions.

The networks compute the same function. They differ in parameter names and in two kinds of shapes: diffusers embeds
patches by a convolution over (channel, time, height, width), ours by a matrix over (height, width, channel); and its
modulation tables have a leading dimension of one. Values aren't changed, so a round trip is bitwise.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sora_train.config.released import ADAPTERS, folder_of, unreadable
from sora_train.core.cli import InputError
from sora_train.models.wan.lora import pairs
from sora_train.models.wan.original import (
    PREFIX,
    is_original,
    is_pickled,
    original_files,
    original_settings,
    pickled,
)
from sora_train.models.wan.released import ROPE_THETA
from sora_train.models.wan.settings import WanConfig

_WEIGHTS = "diffusion_pytorch_model.safetensors"
_ENDS = {  # our names to diffusers', outside of the blocks
    "patch_in": "patch_embedding",
    "text_in.0": "condition_embedder.text_embedder.linear_1",
    "text_in.2": "condition_embedder.text_embedder.linear_2",
    "time_in.0": "condition_embedder.time_embedder.linear_1",
    "time_in.2": "condition_embedder.time_embedder.linear_2",
    "time_modulation.1": "condition_embedder.time_proj",
    "out.modulation": "scale_shift_table",
    "out.project": "proj_out",
}
_BLOCK = {
    "modulation": "scale_shift_table",
    "cross_norm": "norm2",
    "mlp.0": "ffn.net.0.proj",
    "mlp.2": "ffn.net.2",
    **{
        f"{ours}_attention.{mine}": f"{theirs}.{its}"
        for ours, theirs in (("self", "attn1"), ("cross", "attn2"))
        for mine, its in (
            ("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("out", "to_out.0"), ("q_norm", "norm_q"),
            ("k_norm", "norm_k"),
        )
    },
}  # fmt: skip


_ORIGINAL: dict[str, str | Callable[[re.Match[str]], str]] = {  # names of diffusers to those of Wan's own repository
    r"\battn1\.": "self_attn.", r"\battn2\.": "cross_attn.", r"\bto_([qkv])$": r"\1", r"\bto_out\.0$": "o",
    r"\bffn\.net\.0\.proj$": "ffn.0", r"\bffn\.net\.2$": "ffn.2",
    r"^condition_embedder\.text_embedder\.linear_([12])$": lambda m: f"text_embedding.{2 * (int(m[1]) - 1)}",
    r"^condition_embedder\.time_embedder\.linear_([12])$": lambda m: f"time_embedding.{2 * (int(m[1]) - 1)}",
    r"^condition_embedder\.time_proj$": "time_projection.1", r"^proj_out$": "head.head",
    r"^(blocks\.\d+)\.norm2$": r"\1.norm3", r"^scale_shift_table$": "head.modulation",
    r"\.scale_shift_table$": ".modulation",
}  # fmt: skip


def original_name(name: str) -> str:
    """Name of a layer in Wan's own repository, from its name in diffusers."""
    for theirs, its in _ORIGINAL.items():
        name = re.sub(theirs, its, name)
    return name


def original_parameter(name: str) -> str:
    """Name of a parameter in Wan's own repository, from its name in diffusers."""
    layer, _, kind = name.rpartition(".")
    return f"{original_name(layer)}.{kind}" if kind in ("weight", "bias") else original_name(name)


def wan_name(name: str) -> str:
    """Name in diffusers of a parameter of our DiT. Raises KeyError for one that Wan doesn't have."""
    table, prefix, rest = _ENDS, "", name
    if name.startswith("blocks."):
        _, number, rest = name.split(".", 2)
        table, prefix = _BLOCK, f"blocks.{number}."
    if rest in table:
        return prefix + table[rest]
    part, _, kind = rest.rpartition(".")
    return f"{prefix}{table[part]}.{kind}"


def load_wan(dit: nn.Module, path: str | Path) -> None:
    """Copy the weights of a Wan transformer into our DiT.

    `path` is a diffusers transformer, a pipeline with one, or a checkpoint in the layout of Wan's own repository.
    Raises InputError that lists the tensors that are missing, superfluous or of another shape.
    """
    wanted, folder = {wan_name(name): (name, p) for name, p in dit.named_parameters()}, folder_of(path, "transformer")
    if original := is_original(path):
        wanted = {original_parameter(name): ours for name, ours in wanted.items()}
    files = original_files(path) if original else _files(folder)
    found: set[str] = set()
    surplus, shapes = [], []
    for name, tensor in _tensors(files):
        if name not in wanted:
            surplus.append(name)
            continue
        ours, parameter = wanted[name]
        found.add(name)
        if tuple(tensor.shape) != _their_shape(ours, parameter.shape, tensor.shape):
            shapes.append(f"{name} {tuple(tensor.shape)}")
            continue
        with torch.no_grad():
            parameter.copy_(_to_ours(ours, tensor))
    missing = sorted(wanted.keys() - found)
    for what, names in (("misses", missing), ("has a surplus of", sorted(surplus)), ("has other shapes:", shapes)):
        if names:
            raise InputError(f"{folder} {what} {len(names)} tensor(s): {', '.join(names)}")


def save_wan(
    weights: Mapping[str, Tensor],
    model: WanConfig,
    text_width: int,
    folder: Path,
    shard_gib: float = 10.0,
    *,
    layout: str = "diffusers",
) -> None:
    """Write the weights of a DiT as a folder that `WanTransformer3DModel.from_pretrained` loads.

    With the layout `original`, `WanModel.from_pretrained` of Wan's own repository loads it. Weights of more than
    `shard_gib` GiB are split into several files with an index, as in both repositories.

    Raises InputError for a model with options that Wan doesn't have.
    """
    require_wan(model, layout)
    channels = weights["patch_in.weight"].shape[1] // model.patch**2
    theirs = {wan_name(name): _to_theirs(name, tensor, model.patch) for name, tensor in weights.items()}
    if layout == "original":
        theirs = {original_parameter(name): tensor for name, tensor in theirs.items()}
        settings = original_settings(asdict(model) | {"channels": channels}, text_width)
    else:
        settings = _settings(model, channels, text_width)
    folder.mkdir(parents=True, exist_ok=True)
    pattern = _WEIGHTS.replace(".safetensors", "{suffix}.safetensors")
    save_torch_state_dict(theirs, folder, filename_pattern=pattern, max_shard_size=int(shard_gib * 2**30))
    (folder / "config.json").write_text(settings)


def _settings(model: WanConfig, channels: int, text_width: int) -> str:
    """The config.json of a `WanTransformer3DModel`."""
    shape = {
        "_class_name": "WanTransformer3DModel",
        "patch_size": [1, model.patch, model.patch],
        "num_attention_heads": model.heads,
        "attention_head_dim": model.width // model.heads,
        "in_channels": channels,
        "out_channels": channels,
        "text_dim": text_width,
        "freq_dim": model.frequencies,
        "ffn_dim": model.ffn,
        "num_layers": model.depth,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": 1e-6,
        "image_dim": None,
        "added_kv_proj_dim": None,
        "rope_max_seq_len": 1024,
        "pos_embed_seq_len": None,
    }
    return json.dumps(shape, indent=2) + "\n"


def save_adapters(adapters: Mapping[str, Tensor], model: WanConfig, folder: Path, layout: str = "diffusers") -> None:
    """Write the adapters of a DiT as a file that diffusers' `load_lora_weights` and `load_lora_adapter` read.

    With the layout `original`, tensors have the names of Wan's own repository, which ComfyUI and others read.

    The scale alpha / rank is multiplied into B, so that readers that ignore alpha apply the right scale too.
    Raises InputError for a model with options that Wan doesn't have.
    """
    require_wan(model, "adapter")
    factor = model.lora.alpha / model.lora.rank
    theirs: dict[str, Tensor] = {}
    for name, down, up in pairs(adapters):
        layer = wan_name(f"{name}.weight").removesuffix(".weight")
        layer = f"diffusion_model.{original_name(layer)}" if layout == "original" else f"transformer.{layer}"
        theirs |= {f"{layer}.lora_A.weight": down.contiguous(), f"{layer}.lora_B.weight": up * factor}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(theirs, folder / ADAPTERS, metadata={"format": "pt"})


def require_wan(model: WanConfig, form: str) -> None:
    """Raise InputError for a model with options that Wan doesn't have; `form` is the export format for the message."""
    if model.rope_scaling != "none":
        raise InputError(f"format={form}: diffusers' Wan has no model.rope_scaling={model.rope_scaling}; train without")
    if model.activation != "gelu":
        raise InputError(f"format={form} is for Wan transformers: train with model.activation=gelu")
    if model.absolute_positions or model.pooled_text or model.rope_theta != ROPE_THETA:
        raise InputError(
            f"format={form} is for Wan transformers: train with model.absolute_positions=false, "
            f"model.pooled_text=false and model.rope_theta={ROPE_THETA:.0f} (this run has "
            f"{model.absolute_positions}, {model.pooled_text} and {model.rope_theta})"
        )


def _tensors(files: Iterable[Path]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of weights files one at a time, since a 14B model doesn't fit into memory twice."""
    for file in files:
        if is_pickled(file):
            yield from ((name.removeprefix(PREFIX), tensor) for name, tensor in pickled(file, "cpu").items())
            continue
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (not a dict)
                    yield name.removeprefix(PREFIX), opened.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise unreadable(file, error) from error


def _files(folder: Path) -> Iterable[Path]:
    index = folder / f"{_WEIGHTS}.index.json"
    if index.is_file():
        return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    if not (folder / _WEIGHTS).is_file():
        raise InputError(f"{folder} holds neither {_WEIGHTS} nor its index; give a diffusers transformer folder")
    return [folder / _WEIGHTS]


def _their_shape(name: str, ours: torch.Size, theirs: torch.Size) -> tuple[int, ...]:
    """Expected shape of diffusers' tensor for ours; the patch of `patch_in` is taken from theirs."""
    if name == "patch_in.weight" and len(theirs) == 5:
        return ours[0], ours[1] // math.prod(theirs[2:]), *theirs[2:]
    return (1, *ours) if name.endswith("modulation") else tuple(ours)


def _to_ours(name: str, tensor: Tensor) -> Tensor:
    if name == "patch_in.weight":  # D C t h w to D (t h w C)
        return tensor.permute(0, 2, 3, 4, 1).flatten(1)
    return tensor.squeeze(0) if name.endswith("modulation") else tensor


def _to_theirs(name: str, tensor: Tensor, patch: int) -> Tensor:
    if name == "patch_in.weight":
        return tensor.unflatten(1, (1, patch, patch, -1)).permute(0, 4, 1, 2, 3).contiguous()
    return tensor.unsqueeze(0).contiguous() if name.endswith("modulation") else tensor.contiguous()
