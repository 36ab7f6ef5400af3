"""Rotary positions: turning keeps lengths, and a score depends only on how far apart two tokens are."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import pytest
import torch
from omegaconf import DictConfig

from sora_train.config.load import build
from sora_train.core.batch import Layout
from sora_train.core.cli import InputError
from sora_train.models.layers.rope import (
    PLACE_FEATURES,
    UNSCALED,
    Factors,
    axis_sizes,
    frequencies,
    place_features,
    rotate,
    rotations,
)
from sora_train.models.wan.model import DiT
from sora_train.models.wan.settings import ROPE_SCALINGS

CPU = torch.device("cpu")


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


def test_interpolation_puts_places_closer_together_by_the_factor_of_each_axis() -> None:
    plain = rotations([(2, 2, 2)], 24, 100.0, CPU)
    cos, sin = rotations([(3, 7, 2)], 24, 100.0, CPU, "interpolation", (2.0, 6.0, 1.0))
    token = 2 * 14 + 6 * 2 + 1  # time 2, height 6, width 1: at 1, 1 and 1
    torch.testing.assert_close(cos[token], plain[0][-1])
    torch.testing.assert_close(sin[token], plain[1][-1])


def test_ntk_stretches_the_slowest_wave_by_the_factor_and_the_fastest_not() -> None:
    plain = frequencies(128, 10000.0)
    scaled = frequencies(128, 10000.0, "ntk", (4.0, 1.0, 2.5))
    for before, after, factor in zip(plain, scaled, (4.0, 1.0, 2.5), strict=True):
        ratio = before / after
        assert ratio[0] == 1.0 and ratio[-1].item() == pytest.approx(factor)
        assert factor == 1.0 or (ratio.diff() > 0).all()
    assert scaled[0][1].item() == pytest.approx((10000.0 * 4.0 ** (44 / 42)) ** (-2 / 44))
    assert [f.tolist() for f in frequencies(6, 100.0, "ntk", (2.0, 2.0, 2.0))] == [[1.0]] * 3


@pytest.mark.parametrize("scaling", ROPE_SCALINGS)
def test_without_factors_nothing_is_changed(scaling: str) -> None:
    grid = [(3, 2, 4)]
    both = zip(rotations(grid, 24, 50.0, CPU), rotations(grid, 24, 50.0, CPU, scaling), strict=True)
    assert all(torch.equal(plain, ours) for plain, ours in both)


def test_the_model_turns_by_scaled_places() -> None:
    """With factors of 1 bit by bit as without; else each scaling gives something of its own."""

    def network(scaling: str, factors: Factors) -> DiT:
        torch.manual_seed(0)
        dit = DiT(4, 24, 1, 2, 48, 8, frequencies=16, gate_init=1.0, rope_scaling=scaling, rope_factors=factors)
        torch.nn.init.normal_(dit.out.project.weight)
        return dit

    layout, generator = Layout(((5, 2, 2),), (3,)), torch.Generator().manual_seed(1)
    x, text = torch.randn(20, 4, generator=generator), torch.randn(3, 8, generator=generator)
    inputs = (x, text, torch.tensor([0.5]), torch.zeros(20, dtype=torch.long), layout)
    with torch.no_grad():
        plain, same = (network(scaling, UNSCALED)(*inputs) for scaling in ("none", "ntk"))
        pi, ntk = (network(scaling, (2.0, 1.0, 1.0))(*inputs) for scaling in ("interpolation", "ntk"))
    assert torch.equal(plain, same)
    assert len({float(v.abs().sum()) for v in (plain, pi, ntk)}) == 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("model.rope_scaling=nkt",), "model.rope_scaling=nkt; did you mean 'ntk'"),
        (("model.rope_scaling=ntk", "model.rope_factors=[0.5,1,1]"), "must be three, none below 1"),
        (("model.rope_factors=[2,1,1]",), "say nothing with model.rope_scaling=none"),
        (("model.rope_scaling=ntk", "model.rope_factors=[2,1]"), "must be three, none below 1"),
    ],
)
def test_wrong_scalings_are_answered(
    compose_tree: Callable[..., DictConfig], overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        build(compose_tree("experiment=demo", *overrides), need_vae=False)
