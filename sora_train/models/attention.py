"""Attention over packs: every token sees the tokens of its own group and no others."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor


def packed_attention(
    q_NKd: Tensor, k_NKd: Tensor, v_NKd: Tensor, q_lengths: Sequence[int], k_lengths: Sequence[int]
) -> Tensor:
    """softmax(q k^T / sqrt(d)) v within each group; group i holds q_lengths[i] queries and k_lengths[i] keys.

    Neighbouring groups of equal lengths run as one batch. Returns `(N, K, d)` like the queries.
    Raises ValueError if the lengths don't add up to the tensors.
    """
    if sum(q_lengths) != q_NKd.shape[0] or sum(k_lengths) != k_NKd.shape[0] or len(q_lengths) != len(k_lengths):
        raise ValueError(f"groups of {q_lengths} queries and {k_lengths} keys don't match {q_NKd.shape}, {k_NKd.shape}")
    out, q_at, k_at = [], 0, 0
    for (q_len, k_len), run in groupby(zip(q_lengths, k_lengths, strict=True)):
        count = len(list(run))
        q, k, v = (
            x[at : at + count * length].unflatten(0, (count, length)).transpose(1, 2)
            for x, at, length in ((q_NKd, q_at, q_len), (k_NKd, k_at, k_len), (v_NKd, k_at, k_len))
        )
        out.append(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1))
        q_at, k_at = q_at + count * q_len, k_at + count * k_len
    return torch.cat(out) if out else q_NKd
