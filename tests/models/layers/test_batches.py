"""Groups share a call where padding costs less than a call, and each group's rows go in and out once."""

from __future__ import annotations

import pytest
import torch

from sora_train.models.layers.batches import batches


def test_short_groups_of_all_lengths_are_one_batch_and_long_ones_are_not() -> None:
    captions = [11, 17, 14, 25, 12, 16]
    assert [batch.queries.count for batch in batches(captions, captions, True)] == [6]
    assert [batch.queries.count for batch in batches([1560, 1200, 1560], [1560, 1200, 1560], True)] == [1, 2]


def test_without_padding_only_equal_neighbours_share_a_call() -> None:
    found = batches([5, 5, 3, 5], [2, 2, 2, 2], False)
    assert [(batch.queries.count, batch.queries.first) for batch in found] == [(2, 0), (1, 10), (1, 13)]
    assert all(batch.mask is None and batch.queries.index is None for batch in found)


@pytest.mark.parametrize("padding", [True, False])
def test_every_row_goes_in_and_comes_out_at_its_own_place(padding: bool) -> None:
    lengths = [4, 1, 0, 6, 6, 3, 1]
    x_NKd = torch.arange(sum(lengths) * 2.0).view(-1, 2, 1)
    out_NKd = torch.full_like(x_NKd, -1.0)
    for batch in batches(lengths, lengths, padding):
        batch.queries.put(batch.queries.take(x_NKd), out_NKd)
        padded = batch.queries.without_padding(torch.ones_like(batch.queries.take(x_NKd)))
        assert padded.sum() / 2 == (padded.numel() / 2 if batch.queries.real is None else batch.queries.real.sum())
    assert torch.equal(out_NKd, x_NKd)
