"""Samples encoded before training: `KEY.latent.safetensors`, and `KEY.text.safetensors` of a frozen text encoder.

The header of each file records the settings it was made with; a run accepts only what it would have computed itself. No
torch here, so that the index can read headers; `latents.py` reads the tensors.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sora_train.config.cost import geometry
from sora_train.config.registry import METHODS
from sora_train.config.released import folder_of
from sora_train.config.schema import Config
from sora_train.core.cli import InputError
from sora_train.data.read.decode import DecodeError

LATENT, TEXT = "latent.safetensors", "text.safetensors"  # extensions
VERSION = 2  # of how clips are cut, decoded and encoded; a change makes older latents those of another code
DTYPES = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}  # safetensors' names of what latents are stored as
_HEADER = 1 << 20  # bytes that a header may have
_BLOCKS, _BLOCK = 256, 4096  # of a weights file that are hashed
_AGAIN = "encode again (data_tools.encode_latents), or set it back"


def made_with(config: Config) -> dict[str, Any]:
    """Settings that decide the latents and embeddings of a sample, by the key that sets it."""
    d, vae, text = config.data, config.vae, config.text_encoder
    frozen = {} if text.path is None else {
        "text_encoder.path": weights_hash(folder_of(text.path, "text_encoder")),
        "text_encoder.max_tokens": text.max_tokens, "text_encoder.pad_to": text.pad_to,
    }  # fmt: skip
    return {
        "version": VERSION, "vae.path": weights_hash(folder_of(vae.path or "", "vae")), **frozen,
        "data.fps": d.fps, "data.max_frames": d.max_frames, "data.max_pixels": d.max_pixels, "data.fit": d.fit.value,
        "data.deinterlace": d.deinterlace, "data.tone_map": d.tone_map, "model.patch": geometry(config).patch,
    }  # fmt: skip


def weights_hash(folder: Path) -> str:
    """A hash of a model's folder, or file: config.json, and name, size and 256 blocks, evenly spread, of its weights.

    Blocks and not all of it, because every rank does it at every start, and text encoders have 20 GB.
    """
    digest = hashlib.sha256()
    paths = [path for path in (folder / "config.json",) if path.is_file()] + sorted(folder.glob("*.safetensors"))
    if folder.is_file():
        paths = [folder]
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for number in range(min(_BLOCKS, -(-size // _BLOCK))):
                file.seek(max(0, size - _BLOCK) * number // max(1, min(_BLOCKS, -(-size // _BLOCK)) - 1))
                digest.update(file.read(_BLOCK))
    if not paths:
        raise InputError(f"no weights (*.safetensors) at {folder}; check vae.path and text_encoder.path")
    return digest.hexdigest()[:16]


def header(data: bytes) -> dict[str, Any]:
    """The header of a safetensors file from its first bytes; raises DecodeError for anything else."""
    length = int.from_bytes(data[:8], "little")
    try:
        if not 2 <= length <= min(_HEADER, len(data) - 8):
            raise ValueError("a header of no possible length")
        found = json.loads(data[8 : 8 + length])
        if not isinstance(found, dict) or not isinstance(found.get("__metadata__", {}), dict):
            raise ValueError("a header that is no map")
    except (ValueError, RecursionError) as error:
        raise DecodeError("latent_header", f"not safetensors: {error}") from error
    return found | {"__end__": 8 + length}


def probe(head: bytes, size: int) -> dict[str, Any]:
    """Read the index columns (frames, rate, size, encoding) of a latent file.

    Args:
        head: The first bytes of the file, at least its header.
        size: Size of the file in bytes.

    Raises:
        DecodeError: `data_tools.encode_latents` didn't write the file, or it is incomplete.
    """
    found = header(head)
    try:
        tensor, about = found["latents"], dict(json.loads(found["__metadata__"]["about"]))
        frames, height, width = (int(n) for n in about["size"].split("x"))
        fps, shape = float(about["fps"]), [int(n) for n in tensor["shape"]]
        stored = DTYPES[tensor["dtype"]]
        whole = math.prod(shape) * (4 if stored == "fp32" else 2)
        if len(shape) != 4 or min(*shape, frames, height, width) < 1 or found["__end__"] + whole != size:
            raise ValueError(f"latents of shape {shape} in {size} bytes")
        key = json.dumps(dict(json.loads(about["made_with"])), sort_keys=True)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise DecodeError("latent_header", f"not of data_tools.encode_latents: {error!r}"[:200]) from error
    if not 0 <= fps <= 1000:
        raise DecodeError("timeline", f"{fps} frames a second")
    return {
        "frames": frames, "fps": fps, "duration": frames / fps if fps else 0.0, "height": height, "width": width,
        "codec": "latents", "pixel_format": stored, "encoded": key,
    }  # fmt: skip


def require(made: Iterable[str], config: Config, what: str) -> None:
    """Raise InputError unless all settings (the index's `encoded`, empty for pixels) are those that the run would use.

    Each stage of a run has its own sizes; the number format in which latents are stored doesn't matter.
    """
    found = [json.loads(text) for text in sorted(set(made)) if text]
    if not found:
        return
    if not METHODS.get(config.method).reads_latents:
        raise InputError(
            f"{what} holds latents; method={config.method} learns from pixels, so name the shards of the videos"
        )
    expected = made_with(config)
    for other in found:
        for key in sorted(expected | other):
            ours, theirs = expected.get(key), other.get(key)
            if ours != theirs:
                raise InputError(f"{what} holds latents made with {key}: {theirs}, this run has {ours}; {_AGAIN}")
    for number, stage in enumerate(config.data.stages):
        for name in ("fps", "max_frames", "max_pixels"):
            value = getattr(stage, name)
            if value is not None and value != expected[f"data.{name}"]:
                raise InputError(
                    f"{what} holds latents made with data.{name}: {expected[f'data.{name}']}, "
                    f"data.stages[{number}].{name} is {value}; name other shards in that stage, by weights"
                )
