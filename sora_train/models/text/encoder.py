"""A small text encoder that is trained with the model. Words are hashed, so it needs no vocabulary file.

The embedding of a word is the sum of two rows of a table, chosen by two hashes (hash embeddings, Svenstrup et al.
2017). With one row per word, collisions are likely even for a hundred words in a few thousand rows, and a word that
shares its row with a frequent one is never learned. Positions are encoded by RoPE alone: which adjective belongs to
which noun depends on their distance, not on their absolute positions in the caption.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from hashlib import blake2b

import torch
from torch import Tensor, nn

from sora_train.models.layers.attention import host_lengths, packed_attention
from sora_train.models.layers.fused import SquaredRelu
from sora_train.models.layers.rope import line_rotations, rotate

# Tokens: a word of letters, a single digit, a single character of a script written without spaces, a punctuation mark.
_WORDS = re.compile(
    r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\d_\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+|\d|[^\w\s]"
)
_THETA = 100.0  # base of RoPE's frequencies; captions are short
_START = (0, 0)  # rows of the start token of every caption, which gives the empty caption a token too


def tokenize(caption: str, buckets: int, max_tokens: int) -> list[tuple[int, int]]:
    """Table rows of a caption's tokens, two in [0, buckets) each: the start token, then each lower-cased word.

    The hashing trick (Weinberger et al. 2009): no word is unknown, and two words rarely share both rows.
    """
    words = _WORDS.findall(caption.lower())[: max_tokens - 1]
    return [_START, *(_rows(word, buckets - 1) for word in words)]


def _rows(word: str, buckets: int) -> tuple[int, int]:
    digest = int.from_bytes(blake2b(word.encode(), digest_size=8).digest())
    return 1 + (digest >> 32) % buckets, 1 + (digest & 0xFFFFFFFF) % buckets


def tokenize_captions(captions: Sequence[str], buckets: int, max_tokens: int) -> tuple[Tensor, tuple[int, ...]]:
    """Tokenize captions: table rows of all tokens end to end, `(L, 2)` int64 on the host, and each caption's length."""
    rows = [tokenize(caption, buckets, max_tokens) for caption in captions]
    flat = [pair for caption in rows for pair in caption]
    return torch.tensor(flat, dtype=torch.long).view(-1, 2), tuple(map(len, rows))


class TextEncoder(nn.Module):
    """A pre-norm transformer over packed captions."""

    def __init__(self, width: int, depth: int, heads: int, buckets: int) -> None:
        super().__init__()
        self.head_dim = width // heads
        self.words = nn.Embedding(buckets, width)
        self.layers = nn.ModuleList(TextLayer(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.words.weight, std=0.35)

    def forward(self, ids_LR: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """Encode packed captions to features `(L, E)`.

        `ids_LR` are the rows of the table whose sum is a token's embedding, `lengths` the tokens of each caption.
        """
        x_LE = self.words(ids_LR).sum(1)
        rope, groups = line_rotations(lengths, self.head_dim, _THETA, x_LE.device), host_lengths(lengths)
        for layer in self.layers:
            x_LE = layer(x_LE, groups, rope)
        return self.norm(x_LE)


class TextLayer(nn.Module):
    """Self-attention and MLP, each with a LayerNorm before it and a residual connection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q_norm, self.k_norm = nn.RMSNorm(width // heads, 1e-6), nn.RMSNorm(width // heads, 1e-6)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        mlp_out = nn.Linear(4 * width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), SquaredRelu(), mlp_out)
        for last in (self.out, mlp_out):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, x_LE: Tensor, lengths: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """Apply the layer, `(L, E)` to `(L, E)`.

        `lengths` are the tokens of each caption, on the host; `rope` has cos and sin of each token's angles.
        """
        q, k, v = self.qkv(self.attention_norm(x_LE)).unflatten(-1, (3, self.heads, -1)).unbind(1)
        q, k = (rotate(x, *rope) for x in (self.q_norm(q), self.k_norm(k)))
        x_LE = x_LE + self.out(packed_attention(q, k, v, lengths, lengths).flatten(1))
        return x_LE + self.mlp(self.mlp_norm(x_LE))
