"""Shapes of released models, from the config.json files of diffusers and transformers folders.

Imports no torch, so that a folder that doesn't match is reported at once. The weights themselves are read by
`models/wan/convert.py`, `models/video_vae/released.py` and `models/text/released.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sora_train.config.files import read_json
from sora_train.core.cli import InputError

VAES = ("AutoencoderKLWan",)
_LFS = b"version https://git-lfs"
TEXT_ENCODERS = ("umt5", "t5")
ADAPTERS = "pytorch_lora_weights.safetensors"  # where diffusers and peft look for low-rank adapters


def is_released(path: str | Path) -> bool:
    """Tell whether a folder is a whole diffusers pipeline."""
    return (Path(path) / "model_index.json").is_file()


def expands_timesteps(path: str | Path) -> bool:
    """Tell whether a transformer was trained with given frames and a timestep per token (Wan 2.2 TI2V)."""
    index = Path(path) / "model_index.json"
    if index.is_file():
        return bool(read_json(index).get("expand_timesteps"))
    return (original_config(path) or {}).get("model_type") == "ti2v"


def second_transformer(path: str | Path) -> bool:
    """Tell whether a pipeline has two transformers, for high and low noise levels (Wan 2.2's A14B)."""
    index = Path(path) / "model_index.json"
    found = read_json(index).get("transformer_2") if index.is_file() else None
    return bool(found and found[0]) or (Path(path) / "high_noise_model").is_dir()


def original_config(path: str | Path) -> dict[str, Any] | None:
    """The config.json of a folder in the layout of Wan's own repository; None for anything else."""
    file = Path(path) / "config.json"
    if not file.is_file():
        return None
    found = read_config(Path(path), "transformer", "model.init_from")
    return found if found.get("_class_name") == "WanModel" else None


def flow_shift(path: str | Path) -> float | None:
    """Timestep shift in the scheduler configuration of a pipeline; None if there is none."""
    file = Path(path) / "scheduler" / "scheduler_config.json"
    found = read_json(file) if file.is_file() else {}
    shift = found.get("flow_shift") or found.get("shift")
    return None if shift is None else float(shift)


def folder_of(path: str | Path, part: str) -> Path:
    """Folder of one model: the subfolder `part` if `path` is a complete diffusers pipeline, else `path` itself."""
    return Path(path) / part if is_released(path) else Path(path)


def adapter_file(path: str | Path) -> Path:
    """Path of an adapter file: `ADAPTERS` inside `path` if that is a folder, else `path` itself."""
    return Path(path) / ADAPTERS if Path(path).is_dir() else Path(path)


def first_weights(folder: Path) -> Path:
    """The first safetensors file of a folder, or model.safetensors if there is none."""
    return next(iter(sorted(folder.glob("*.safetensors"))), folder / "model.safetensors")


def unreadable(file: Path, error: Exception) -> InputError:
    """Build the InputError for an unreadable weights file: truncated, missing, or only a Git LFS pointer."""
    try:
        with file.open("rb") as opened:
            pointer = opened.read(len(_LFS)) == _LFS
    except OSError:
        return InputError(f"{file} can't be read ({getattr(error, 'strerror', None) or error}); fetch it again")
    if pointer:
        return InputError(f"{file} is a pointer of Git LFS and not the file; fetch it with `git lfs pull`")
    return InputError(f"{file} can't be read as safetensors ({str(error).splitlines()[0]}); fetch it again")


def read_config(folder: Path, what: str, key: str) -> dict[str, Any]:
    """Read the config.json of a folder.

    `what` (kind of model) and `key` (configuration key with the folder) are used in the message of the InputError.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise InputError(f"no {what} at {key}={folder} (there is no {file}); give the folder of its config.json")
    return read_json(file)


def vae_shape(path: str | Path) -> dict[str, Any] | None:
    """Values for `VaeConfig` from a diffusers VAE folder; None if the folder isn't one (a VAE of our own)."""
    folder = folder_of(path, "vae")
    if folder.is_file():
        raise InputError(
            f"vae.path={path} is a file; give a folder: vae/ of a -Diffusers release, or an export of a VAE run"
        )
    if not (folder / "config.json").is_file():
        return None
    c = read_config(folder, "VAE", "vae.path")
    if "_class_name" not in c:
        return None
    if c["_class_name"] not in VAES:
        raise InputError(f"{folder} holds a {c['_class_name']}; vae.path reads {', '.join(VAES)}, or a VAE of our own")
    temporal, spatial = c.get("scale_factor_temporal", 4), c.get("scale_factor_spatial", 8)
    return {"class_name": c["_class_name"], "channels": c["z_dim"], **_like(temporal, spatial)}


def _like(temporal: int, spatial: int) -> dict[str, Any]:
    """Shape of one of our own VAEs with the strides of a released one, which stands in for it in forecasts."""
    return {
        "patch": spatial // 4, "strides": [[temporal // 2, 2], [2, 2]], "widths": [96, 192, 384], "blocks": [1, 2, 2],
    }  # fmt: skip


def text_width(path: str | Path) -> int:
    """Embedding width of the T5 or umT5 encoder in a folder."""
    folder = folder_of(path, "text_encoder")
    c = read_config(folder, "text encoder", "text_encoder.path")
    if c.get("model_type") not in TEXT_ENCODERS:
        raise InputError(f"{folder} holds a {c.get('model_type')}; text_encoder.path reads {', '.join(TEXT_ENCODERS)}")
    return int(c["d_model"])
