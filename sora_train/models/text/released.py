"""Frozen T5 and umT5 encoders from a local folder, through transformers."""

from __future__ import annotations

import html
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, T5EncoderModel, UMT5EncoderModel

from sora_train.config.released import first_weights, folder_of, unreadable
from sora_train.core.batch import send
from sora_train.core.cli import InputError

_AT_ONCE = 16  # captions per forward pass, limited because activations need far more memory than embeddings
_CLASSES = {"t5": T5EncoderModel, "umt5": UMT5EncoderModel}


class ReleasedText:
    """Maps captions to embeddings.

    With `pad_to` above 0, the embeddings of each caption are padded with zeros to `pad_to` tokens, because Wan was
    trained with zeros that are attended to. The weights are loaded with the first caption, because a run whose shards
    contain embeddings needs them for previews only.
    """

    def __init__(self, path: str, device: torch.device, max_tokens: int, pad_to: int) -> None:
        self.path, self.max_tokens, self.pad_to, self.device = path, max_tokens, pad_to, device

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, tuple[int, ...]]:
        """Embed captions: embeddings of all tokens end to end, `(L, E)` on the device, and each caption's length."""
        starts = range(0, len(captions), _AT_ONCE)
        rows = [row for at in starts for row in self._embedded(captions[at : at + _AT_ONCE])]
        return torch.cat(rows), tuple(map(len, rows))

    def _embedded(self, captions: Sequence[str]) -> list[Tensor]:
        tokenizer, encoder = _load(self.path, self.device)
        batch = tokenizer(
            [_clean(caption) for caption in captions], padding=True, truncation=True, max_length=self.max_tokens,
            return_tensors="pt",
        )  # fmt: skip
        lengths = batch.attention_mask.sum(1).tolist()
        ids, mask = send(batch.input_ids, self.device), send(batch.attention_mask, self.device)
        embedded_BLE = encoder(ids, attention_mask=mask).last_hidden_state
        rows = [row[:length] for row, length in zip(embedded_BLE, lengths, strict=True)]
        if self.pad_to:
            rows = [torch.cat((row, row.new_zeros(self.pad_to - len(row), row.shape[1]))) for row in rows]
        return rows


def token_counts(path: str, captions: Sequence[str]) -> list[int]:
    """Number of tokens of each caption before truncation; the encoder itself is not loaded."""
    ids = _tokenizer(path)([_clean(caption) for caption in captions], truncation=False, verbose=False).input_ids
    return list(map(len, ids))


@lru_cache(maxsize=1)
def _load(path: str, device: torch.device) -> tuple[AutoTokenizer, torch.nn.Module]:
    """Load tokenizer and encoder of a folder. Cached, so that training and previews share them."""
    folder, tokenizer = folder_of(path, "text_encoder"), _tokenizer(path)
    try:
        kind = _CLASSES[AutoConfig.from_pretrained(folder, local_files_only=True).model_type]
        encoder = kind.from_pretrained(folder, local_files_only=True, dtype="auto")
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise unreadable(first_weights(folder), error) from error
    return tokenizer, encoder.to(device).eval().requires_grad_(False)


@lru_cache(maxsize=1)
def _tokenizer(path: str) -> AutoTokenizer:
    try:
        return AutoTokenizer.from_pretrained(folder_of(path, "tokenizer"), local_files_only=True)
    except (OSError, ValueError) as error:
        raise _unusable(path, error) from error


def _unusable(path: str, error: Exception) -> InputError:
    return InputError(f"text_encoder.path={Path(path)}: {str(error).splitlines()[0]}")


def _clean(caption: str) -> str:
    """Resolve HTML entities (twice, because captions from the web are often escaped twice) and collapse white space."""
    return " ".join(html.unescape(html.unescape(caption)).split())
