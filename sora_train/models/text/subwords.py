"""A subword tokenizer that is trained on the captions of a run: byte-level BPE (Sennrich et al. 2016), by `tokenizers`.

Frequent words are one token and rare ones several. Every byte is a token too, so no text is unknown. The tokenizer is
saved as a file of the run; everything that encodes captions for the run's model needs it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from sora_train.core.cli import InputError

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads would conflict with forked decode processes
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers  # noqa: E402

_START = "<start>"  # first token of every caption, so that the empty caption has a token too


def train_subwords(captions: Iterable[str], entries: int) -> str:
    """Train a tokenizer of at most `entries` tokens; returns the content of its file. The result is deterministic."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=True)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=entries, min_frequency=2, special_tokens=[_START], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    tokenizer.train_from_iterator(captions, trainer)
    return tokenizer.to_str()


def tokenize_subwords(path: str, captions: Sequence[str], max_tokens: int) -> tuple[Tensor, tuple[int, ...]]:
    """Tokenize captions: rows of the embedding table end to end, `(L, 1)` int64, and the number of tokens of each."""
    tokenizer = load_subwords(path)
    start = tokenizer.token_to_id(_START)
    rows = [[start, *tokenizer.encode(caption).ids][:max_tokens] for caption in captions]
    return torch.tensor([row for caption in rows for row in caption]).view(-1, 1), tuple(map(len, rows))


@lru_cache(maxsize=4)
def load_subwords(path: str) -> Tokenizer:
    """Read the file of a tokenizer. Raises InputError if the file is missing or is no tokenizer."""
    if not Path(path).is_file():
        raise InputError(f"{path} is missing, the tokenizer that the model was trained with; put it back there")
    try:
        tokenizer = Tokenizer.from_file(path)
    except Exception as error:  # the library raises nothing narrower
        raise InputError(f"{path} can't be read as a tokenizer ({error}); put the run's own back there") from error
    if tokenizer.token_to_id(_START) is None:
        raise InputError(f"{path} is a tokenizer of another kind (it has no {_START}); put the run's own back there")
    return tokenizer
