"""Checkpoints in the layout of Wan's own repository: its folder, or one file of its transformer.

As Wan-AI publishes them beside the `-Diffusers` folders (`config.json` of a `WanModel` with
`diffusion_pytorch_model*.safetensors`), and as ComfyUI and training scripts keep them (one `.safetensors`, `.pth` or
`.pt` file). Shapes are those of the tensors, since files have no configuration. Torch is imported for `.pth` alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sora_train.config.released import original_config, unreadable
from sora_train.core.cli import InputError

PREFIX = "model.diffusion_model."  # before each name in files that ComfyUI wrote
_HEAD = 128  # channels of a head in all of Wan's models
_PICKLED = (".pth", ".pt")
_STRANGE = ("img_emb.", "vace_", "motion_encoder.", "face_adapter.", "control_adapter.", "ref_conv.")
_NEEDED = ("patch_embedding.weight", "text_embedding.0.weight", "time_embedding.0.weight", "blocks.0.ffn.0.weight")


def is_original(path: str | Path) -> bool:
    """Tell whether a path is a checkpoint in the layout of Wan's own repository: a single file, or its folder."""
    return Path(path).is_file() or original_config(path) is not None


def original_files(path: str | Path) -> list[Path]:
    """The weights files of a checkpoint. Raises InputError where a folder has none."""
    if Path(path).is_file():
        return [Path(path)]
    if found := sorted(Path(path).glob("diffusion_pytorch_model*.safetensors")):
        return found
    raise InputError(f"model.init_from={path} has no diffusion_pytorch_model*.safetensors; fetch the whole folder")


def original_shape(path: str | Path) -> dict[str, Any]:
    """Shape of a `WanModel`: keys of `WanConfig`, and `channels` and `text_width` in addition.

    Raises InputError for files of something else, and for models with parts that our DiT doesn't have.
    """
    shapes = dict(_shapes(original_files(path)))
    missing = [name for name in _NEEDED if name not in shapes]
    if missing:
        raise InputError(
            f"model.init_from={path} is no Wan transformer in the names of its own repository (no {missing[0]}); give "
            "its file or folder, or a -Diffusers release"
        )
    strange = sorted({name.split(".")[0] for name in shapes if name.startswith(_STRANGE)})
    width, channels, time, height, side = shapes["patch_embedding.weight"]
    out = shapes["head.head.weight"][0] // (height * side)
    if strange or time != 1 or height != side or out != channels:
        about = f"has {', '.join(strange)}" if strange else f"takes {channels} channels and gives {out}"
        raise InputError(
            f"model.init_from={path} {about}, which our transformer doesn't know; use a text-to-video or TI2V model"
        )
    heads = (original_config(path) or {}).get("num_heads", width // _HEAD)
    ffn, frequencies = shapes["blocks.0.ffn.0.weight"][0], shapes["time_embedding.0.weight"][1]
    depth = len({name.split(".")[1] for name in shapes if name.startswith("blocks.")})
    return {
        "width": width, "depth": depth, "heads": heads, "ffn": ffn, "patch": side, "frequencies": frequencies,
        "channels": channels, "text_width": shapes["text_embedding.0.weight"][1],
    }  # fmt: skip


def pickled(file: Path, place: str) -> dict[str, Any]:
    """Load the tensors of a `.pth` file by name, memory-mapped. No code in it is executed.

    `place` is "cpu", or "meta" for shapes alone. Raises InputError if it can't be read or isn't a map of tensors.
    """
    import torch

    try:
        found = torch.load(file, map_location=place, weights_only=True, mmap=True)
    except Exception as error:  # pickle and zip raise anything
        raise unreadable(file, error) from error
    if not isinstance(found, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in found.values()):
        raise InputError(f"{file} is no map of names to tensors; save the transformer's state_dict alone")
    return found


def is_pickled(file: Path) -> bool:
    """Tell whether a file was written by torch.save, from its suffix."""
    return file.suffix in _PICKLED


def original_settings(shape: dict[str, Any], text_width: int) -> str:
    """The config.json of a `WanModel`; `shape` as from `original_shape`."""
    kind = "ti2v" if shape["channels"] == 48 else "t2v"  # 48: Wan 2.2's 5B model, which accepts given frames
    its = {
        "_class_name": "WanModel", "model_type": kind, "dim": shape["width"], "ffn_dim": shape["ffn"],
        "freq_dim": shape["frequencies"], "text_dim": text_width, "text_len": 512, "in_dim": shape["channels"],
        "out_dim": shape["channels"], "num_heads": shape["heads"], "num_layers": shape["depth"], "eps": 1e-6,
    }  # fmt: skip
    return json.dumps(its, indent=2) + "\n"


def _shapes(files: list[Path]) -> Iterator[tuple[str, list[int]]]:
    from safetensors import SafetensorError, safe_open

    for file in files:
        if is_pickled(file):
            yield from ((name.removeprefix(PREFIX), list(t.shape)) for name, t in pickled(file, "meta").items())
            continue
        try:
            with safe_open(file, framework="numpy") as opened:
                for name in opened.keys():  # noqa: SIM118 (not a dict)
                    yield name.removeprefix(PREFIX), opened.get_slice(name).get_shape()
        except (OSError, SafetensorError) as error:
            raise unreadable(file, error) from error
