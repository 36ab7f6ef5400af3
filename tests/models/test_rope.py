"""Rotary positions: turning keeps lengths, and a score depends only on how far apart two tokens are."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch

from sora_train.models.rope import PLACE_FEATURES, axis_sizes, frequencies, place_features, rotate, rotations


@pytest.mark.parametrize(("head", "sizes"), [(128, (44, 42, 42)), (16, (8, 4, 4)), (64, (24, 20, 20)), (24, (8, 8, 8))])
def test_axes_share_a_head(head: int, sizes: tuple[int, int, int]) -> None:
    assert axis_sizes(head) == sizes
    assert sum(sizes) == head and all(size % 2 == 0 for size in sizes)


def test_frequencies_fall_geometrically_from_one() -> None:
    time, height, _ = frequencies(24, 100.0)
    assert time.tolist() == pytest.approx([1.0, 100**-0.25, 0.1, 100**-0.75])
    assert torch.equal(time, height)


def test_angles_are_place_times_frequency() -> None:
    cos, sin = rotations([(2, 2, 3)], 24, 100.0, torch.device("cpu"))
    assert cos.shape == sin.shape == (12, 12)
    token = 1 * 6 + 1 * 3 + 2  # time 1, height 1, width 2
    assert cos[token, 0].item() == pytest.approx(math.cos(1.0))
    assert sin[token, 4].item() == pytest.approx(math.sin(1.0))
    assert sin[token, 8].item() == pytest.approx(math.sin(2.0))
    assert sin[token, 9].item() == pytest.approx(math.sin(2.0 * 100**-0.25))


def test_every_clip_counts_from_its_own_origin() -> None:
    together = rotations([(1, 2, 2), (3, 2, 1)], 12, 50.0, torch.device("cpu"))
    apart = [rotations([grid], 12, 50.0, torch.device("cpu")) for grid in ((1, 2, 2), (3, 2, 1))]
    for part, ours in enumerate(together):
        assert torch.equal(ours, torch.cat([one[part] for one in apart]))
    assert torch.equal(together[0][[0, 4]], torch.ones(2, 6)), "the first token of a clip isn't turned"


def test_turning_keeps_lengths_and_mixes_neighbouring_channels() -> None:
    x = torch.randn(12, 2, 24)
    turned = rotate(x, *rotations([(2, 2, 3)], 24, 100.0, torch.device("cpu")))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(turned.unflatten(-1, (-1, 2)).norm(dim=-1), x.unflatten(-1, (-1, 2)).norm(dim=-1))


def test_scores_depend_on_relative_place_alone() -> None:
    grid = (3, 3, 4)
    q, k = torch.randn(2, 1, 1, 24).expand(-1, 36, 1, 24)
    cos_sin = rotations([grid], 24, 100.0, torch.device("cpu"))
    scores = (rotate(q, *cos_sin).squeeze(1) @ rotate(k, *cos_sin).squeeze(1).T).tolist()
    places = list(product(*map(range, grid)))
    by_offset: dict[tuple[int, ...], list[float]] = {}
    for i, j in product(range(36), repeat=2):
        offset = tuple(a - b for a, b in zip(places[i], places[j], strict=True))
        by_offset.setdefault(offset, []).append(scores[i][j])
    assert len(by_offset) == 5 * 5 * 7
    assert max(max(values) - min(values) for values in by_offset.values()) < 1e-4
    assert len({round(values[0], 4) for values in by_offset.values()}) > 150, "and it does depend on it"


def test_place_features_tell_every_token_of_a_clip_apart_and_scale_with_the_clip() -> None:
    cpu = torch.device("cpu")
    small, large = place_features([(2, 2, 4)], cpu), place_features([(2, 2, 4), (4, 2, 4)], cpu)
    assert small.shape == (16, PLACE_FEATURES)
    assert torch.equal(large[:16], small)  # a clip's features don't depend on its neighbours
    assert torch.cdist(small, small).fill_diagonal_(1.0).min() > 0.1
    middle = place_features([(1, 1, 1)], cpu)[0]
    half_wave = math.sqrt(2.0) * torch.tensor([1.0, 0.0, -1.0, 0.0])  # sines at the middle of every axis
    assert torch.allclose(middle[:4], half_wave, atol=1e-6)
