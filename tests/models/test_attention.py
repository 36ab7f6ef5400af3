"""Packed attention is the plain formula with a block mask, forwards and backwards."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sora_train.models.attention import packed_attention


def plain(q_NKd: Tensor, k_NKd: Tensor, v_NKd: Tensor, q_lengths: list[int], k_lengths: list[int]) -> Tensor:
    """The oracle: softmax over all keys, those of other groups at minus infinity."""
    groups = torch.arange(len(q_lengths))
    q_group, k_group = (
        groups.repeat_interleave(torch.tensor(q_lengths)),
        groups.repeat_interleave(torch.tensor(k_lengths)),
    )
    scores = torch.einsum("nkd,mkd->knm", q_NKd, k_NKd) / q_NKd.shape[-1] ** 0.5
    scores = scores.masked_fill(q_group[:, None] != k_group[None, :], float("-inf"))
    return torch.einsum("knm,mkd->nkd", scores.softmax(-1), v_NKd)


LENGTHS = {
    "one clip": ([7], [7]),
    "clips of all lengths": ([5, 5, 3, 9, 9, 9, 2], [5, 5, 3, 9, 9, 9, 2]),
    "clips of one token": ([1, 1, 4, 1], [1, 1, 4, 1]),
    "cross": ([6, 6, 2, 2], [3, 3, 1, 8]),
    "equal queries, unequal keys": ([4, 4, 4], [2, 5, 2]),
}


@pytest.mark.parametrize("name", LENGTHS)
def test_packed_attention_equals_the_plain_formula(name: str) -> None:
    q_lengths, k_lengths = LENGTHS[name]
    torch.manual_seed(0)
    inputs = [
        torch.randn(n, 2, 8, dtype=torch.float64, requires_grad=True) for n in (sum(q_lengths), *[sum(k_lengths)] * 2)
    ]
    upstream = torch.randn(sum(q_lengths), 2, 8, dtype=torch.float64)
    results = []
    for attention in (packed_attention, plain):
        out = attention(*inputs, q_lengths, k_lengths)
        results.append((out, *torch.autograd.grad(out, inputs, upstream)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_a_clip_of_one_token_attends_to_itself() -> None:
    value = torch.randn(1, 2, 4)
    torch.testing.assert_close(packed_attention(torch.randn(1, 2, 4), torch.randn(1, 2, 4), value, [1], [1]), value)


@pytest.mark.parametrize(("q_lengths", "k_lengths"), [([3], [4]), ([2, 2], [4]), ([5], [5])])
def test_groups_that_do_not_add_up_are_refused(q_lengths: list[int], k_lengths: list[int]) -> None:
    x = torch.randn(4, 1, 2)
    with pytest.raises(ValueError, match="don't match"):
        packed_attention(x, x, x, q_lengths, k_lengths)
