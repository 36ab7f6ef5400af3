"""Captions to text rows: word ids for the text encoder that is trained with the model, or a frozen one's embeddings."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sora_train.config.schema import Config
from sora_train.core.cost import TEXT_TOKENS
from sora_train.models.text.encoder import tokenize, tokenize_captions

Tokenize = Callable[[Sequence[str]], tuple[Tensor, tuple[int, ...]]]  # captions to rows end to end, and their lengths
_UNLIMITED = 1 << 40


def tokenizer(config: Config, device: torch.device = torch.device("cpu")) -> Tokenize:  # noqa: B008 (immutable)
    """Function from captions to the text rows that the network of this configuration takes.

    The rows are ids for our own text encoder, `(L, 2)` of hashed words or `(L, 1)` of subwords, or embeddings `(L, E)`
    of a released one on `device`.
    """
    t = config.text_encoder
    if t.path is not None:
        from sora_train.models.text.released import ReleasedText  # transformers takes seconds to import

        return ReleasedText(t.path, device, t.max_tokens, t.pad_to)
    if (file := config.tokenizer_file) is not None:
        from sora_train.models.text.subwords import load_subwords, tokenize_subwords

        load_subwords(file)  # a missing one is reported now
        return lambda captions: tokenize_subwords(file, captions, t.max_tokens)
    return lambda captions: tokenize_captions(captions, t.buckets, t.max_tokens)


def planned_tokenizer(config: Config, device: torch.device) -> Tokenize:
    """As `tokenizer` for a forecast, which reads no files: a released encoder's embeddings, and subwords, are zeros."""
    t = config.text_encoder
    if t.path is None and config.tokenizer_file is None:
        return tokenizer(config, device)
    length = t.pad_to or TEXT_TOKENS
    width, dtype = (1, torch.long) if t.path is None else (t.width, torch.float32)

    def blank(captions: Sequence[str]) -> tuple[Tensor, tuple[int, ...]]:
        rows = torch.zeros(length * len(captions), width, dtype=dtype, device=device)
        return rows, (length,) * len(captions)

    return blank


def count_tokens(config: Config, captions: Sequence[str]) -> list[int]:
    """Tokens of captions before any are cut off at `text_encoder.max_tokens`."""
    t = config.text_encoder
    if t.path is not None:
        from sora_train.models.text.released import token_counts  # transformers takes seconds to import

        return token_counts(t.path, captions)
    if (file := config.tokenizer_file) is not None:
        from sora_train.models.text.subwords import tokenize_subwords

        return list(tokenize_subwords(file, captions, _UNLIMITED)[1])
    return [len(tokenize(caption, t.buckets, _UNLIMITED)) for caption in captions]
