"""Reading of latents and text embeddings that were encoded before training (their headers: `read/encoded.py`)."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from sora_train.data.index.index import Index
from sora_train.data.read.decode import DecodeError
from sora_train.data.read.encoded import TEXT, header


class Encoded(NamedTuple):
    """Precomputed latents of a clip, and embeddings of its captions where their encoder is frozen."""

    latents_CTHW: Tensor  # fp32, normalised
    texts: list[Tensor]  # (L, E) of each caption in the order of the json, then of no caption; may be empty


def to_bytes(latents_CTHW: Tensor, about: dict[str, str]) -> bytes:
    """The member of one clip's latents; `about` is what `encoded.probe` reads."""
    text = json.dumps(about, sort_keys=True)  # one entry: safetensors writes several in any order
    return save({"latents": latents_CTHW.contiguous().cpu()}, {"about": text})


def texts_to_bytes(rows: list[Tensor], pad_to: int) -> bytes:
    """The member of embeddings: of each caption, then of none. Zeros after the last token (`pad_to`) aren't stored."""
    kept = {}
    for number, row_LE in enumerate(rows):
        used = int(row_LE.abs().amax(1).nonzero().max()) + 1 if pad_to else len(row_LE)
        kept[f"{number:04d}"] = row_LE[:used].contiguous().cpu()
    return save(kept, {"pad_to": str(pad_to)})


def read(index: Index, sample: int) -> Encoded:
    """The tensors of a sample, checked against the index; raises DecodeError."""
    path, extension, (offset, size, crc32) = index.member(sample)
    data = index.read(path, (offset, size), crc32, extension)
    texts: list[Tensor] = []
    more = index.further(sample)
    try:
        latents = load(data)["latents"].float()
        if TEXT in more:
            offset, size, crc32 = more[TEXT]
            data = index.read(path, (offset, size), crc32, TEXT)
            pad_to = int(header(data)["__metadata__"]["pad_to"])
            texts = [_padded(row, pad_to) for _, row in sorted(load(data).items())]
    except (SafetensorError, KeyError, ValueError) as error:
        raise DecodeError("latent_header", f"{error!r}"[:200]) from error
    return Encoded(latents, texts)


def _padded(row_LE: Tensor, tokens: int) -> Tensor:
    return torch.nn.functional.pad(row_LE, (0, 0, 0, max(0, tokens - len(row_LE))))


def check_size(found: Encoded, wanted: tuple[int, int, int]) -> Encoded:
    """Raise DecodeError unless the latents are `wanted` long, high and wide."""
    shape: Any = tuple(found.latents_CTHW.shape[1:])
    if shape != wanted:
        raise DecodeError("latent_size", f"latents of {shape}, the clip has {wanted}; data.max_tokens may be too low")
    return found
