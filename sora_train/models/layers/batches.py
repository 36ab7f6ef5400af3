"""Batching of a pack's attention groups: few padded batches instead of one attention call per group.

On a CPU, the call overhead of a small group exceeds its computation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

_CALL = 8192  # overhead of an attention call, as the number of query-key pairs computed in the same time


@dataclass(frozen=True)
class Rows:
    """Rows of some groups of a packed tensor, padded to a block of `count` groups of `longest` rows each."""

    count: int
    longest: int
    first: int  # first row, if the groups are adjacent and of equal length; else -1
    index: Tensor | None = None  # (count x longest,) row numbers otherwise; padding repeats a group's first row
    real: Tensor | None = None  # (count x longest,) bool, False at padding; None without padding

    def take(self, x_NKd: Tensor) -> Tensor:
        """Gather the block `(count, K, longest, d)` from a packed tensor `(N, K, d)`."""
        if self.index is None:
            rows = x_NKd[self.first : self.first + self.count * self.longest]
        else:
            rows = x_NKd.index_select(0, self.index)
        return rows.unflatten(0, (self.count, self.longest)).transpose(1, 2)

    def put(self, block_BKnd: Tensor, out_NKd: Tensor) -> None:
        """Write a block to its rows of a packed tensor in place, padding excluded."""
        rows = block_BKnd.transpose(1, 2)
        if self.index is None:
            whole = out_NKd[self.first : self.first + self.count * self.longest]
            whole.unflatten(0, (self.count, self.longest)).copy_(rows)
        elif self.real is None:
            out_NKd.index_copy_(0, self.index, rows.flatten(0, 1))
        else:
            out_NKd.index_copy_(0, self.index[self.real], rows.flatten(0, 1)[self.real])

    def without_padding(self, block_BKnd: Tensor) -> Tensor:
        """The block with its padding rows set to zero."""
        if self.real is None:
            return block_BKnd
        return block_BKnd * self.real.view(self.count, 1, self.longest, 1)


@dataclass(frozen=True)
class Batch:
    """Groups that are computed in one attention call.

    `mask` `(count, 1, 1, keys)` is False at padding keys; None without padding.
    """

    queries: Rows
    keys: Rows
    mask: Tensor | None

    def bias(self, like: Tensor) -> Tensor | None:
        """Bias to add to the scores, `(count, 1, queries, keys)`: minus infinity at padding. None without padding."""
        if self.mask is None:
            return None
        bias = torch.zeros(self.mask.shape, dtype=like.dtype).masked_fill_(~self.mask, float("-inf"))
        return bias.expand(-1, -1, self.queries.longest, -1)


def batches(q_list: Sequence[int], k_list: Sequence[int], padding: bool) -> tuple[Batch, ...]:
    """Divide the groups that have queries into batches.

    With `padding`, groups of similar lengths are padded to one batch if that costs less than another call; without it,
    only consecutive groups of equal lengths share a batch. Cached, because all layers of a network need the same ones.

    Args:
        q_list: Queries of each group.
        k_list: Keys of each group.
        padding: Allow padded groups.
    """
    return _batches(tuple(q_list), tuple(k_list), padding)


@lru_cache(maxsize=64)
def _batches(q_list: tuple[int, ...], k_list: tuple[int, ...], padding: bool) -> tuple[Batch, ...]:
    q_firsts, k_firsts = (list(accumulate(lengths, initial=0)) for lengths in (q_list, k_list))
    found = []
    for groups in _together(q_list, k_list, padding):
        queries = _rows([q_firsts[g] for g in groups], [q_list[g] for g in groups])
        keys = _rows([k_firsts[g] for g in groups], [k_list[g] for g in groups])
        mask = None if keys.real is None else keys.real.view(keys.count, 1, 1, keys.longest)
        found.append(Batch(queries, keys, mask))
    return tuple(found)


def _together(q_list: Sequence[int], k_list: Sequence[int], padding: bool) -> Iterator[list[int]]:
    """Yield the numbers of the groups of each batch. Padding makes each group of a batch as large as the largest."""
    asking = [group for group, queries in enumerate(q_list) if queries]
    if padding:
        asking.sort(key=lambda group: (q_list[group], k_list[group]))
    batch: list[int] = []
    most = 0  # most keys of a group of the batch
    for group in asking:
        queries, keys = q_list[group], k_list[group]
        if batch:
            before = len(batch) * q_list[batch[-1]] * most
            wasted = (len(batch) + 1) * queries * max(most, keys) - before - queries * keys
            equal = (queries, keys) == (q_list[batch[-1]], most)
            if not (equal or (padding and wasted <= _CALL)):
                yield batch
                batch, most = [], 0
        batch.append(group)
        most = max(most, keys)
    if batch:
        yield batch


def _rows(firsts: list[int], lengths: list[int]) -> Rows:
    longest = max(lengths)
    if all(length == longest for length in lengths):
        if firsts == list(range(firsts[0], firsts[0] + longest * len(firsts), longest)):
            return Rows(len(firsts), longest, firsts[0])
        return Rows(len(firsts), longest, -1, (torch.tensor(firsts)[:, None] + torch.arange(longest)).flatten())
    real = torch.arange(longest) < torch.tensor(lengths)[:, None]
    index = torch.tensor(firsts)[:, None] + torch.where(real, torch.arange(longest), 0)
    return Rows(len(firsts), longest, -1, index.flatten(), real.flatten())
