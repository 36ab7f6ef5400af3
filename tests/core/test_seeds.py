"""Order and noise come from fixed arithmetic: the values below hold on every machine and with every library."""

from __future__ import annotations

import numpy as np
import pytest

from sora_train.core import seeds
from sora_train.core.seeds import below, hash64, order, stream, uniform


def test_the_first_hash_is_the_published_first_output_of_splitmix64() -> None:
    assert int(hash64(0)) == 0xE220A8397B1DCDAF


@pytest.mark.parametrize(
    ("parts", "value"),
    [
        ((1,), 10451216379200822465),
        ((1, 2), 13608149317741381227),
        ((2, 1), 16171810823986729605),
        ((-1,), 16490336266968443936),
        ((2**63, 7), 9724714553024891474),
    ],
)
def test_hashes_are_fixed(parts: tuple[int, ...], value: int) -> None:
    assert int(hash64(*parts)) == value


def test_derived_numbers_are_fixed() -> None:
    assert float(uniform(0)) == 0.8833108082136426
    assert float(uniform(1, 2)) == 0.7376992526901169
    assert [int(below(10, i)) for i in range(12)] == [8, 5, 5, 1, 4, 3, 7, 3, 6, 6, 0, 3]
    assert order(7, np.arange(10)).tolist() == [7, 8, 1, 2, 3, 9, 5, 4, 0, 6]
    assert stream(5, seeds.NOISE) == 8085554486513530180
    assert stream(2**64 - 1, seeds.TASK) == 3377987053190985883


def test_one_integer_hashes_the_same_in_every_type() -> None:
    values = [hash64(v) for v in (2**64 - 1, -1, np.int64(-1), np.uint64(2**64 - 1), np.array([-1])[0])]
    assert len({int(v) for v in values}) == 1


def test_a_vector_hashes_as_its_elements_do() -> None:
    numbers = np.arange(50)
    assert hash64(3, numbers, 9).tolist() == [int(hash64(3, n, 9)) for n in range(50)]
    assert uniform(numbers).tolist() == [float(uniform(n)) for n in range(50)]
    assert below(numbers + 1, 4, numbers).tolist() == [int(below(n + 1, 4, n)) for n in range(50)]
    assert hash64(numbers[:, None], numbers[None, :]).shape == (50, 50)


def test_uniform_is_uniform_and_uncorrelated() -> None:
    u = uniform(11, np.arange(100_000))
    assert u.min() >= 0.0 and u.max() < 1.0
    assert abs(u.mean() - 0.5) < 0.004  # four standard errors
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 0.0127
    counts, _ = np.histogram(u, bins=100, range=(0, 1))
    assert ((counts - 1000) ** 2 / 1000).sum() < 160  # chi-square with 99 degrees of freedom: p = 0.0001


def test_below_covers_its_range_evenly() -> None:
    counts = np.bincount(below(7, 5, np.arange(70_000)), minlength=7)
    assert len(counts) == 7
    assert np.abs(counts - 10_000).max() < 400


def test_order_is_a_permutation_that_depends_on_every_part() -> None:
    first, second = order(1, 0, np.arange(1000)), order(1, 1, np.arange(1000))
    assert sorted(first.tolist()) == list(range(1000))
    assert (first != second).mean() > 0.98


def test_one_flipped_bit_of_the_seed_flips_half_of_the_hash() -> None:
    numbers = np.arange(2000, dtype=np.uint64)
    for bit in (0, 17, 63):
        flipped = hash64(numbers) ^ hash64(numbers ^ np.uint64(1 << bit))
        assert 31.0 < np.bitwise_count(flipped).mean() < 33.0


def test_streams_of_a_visit_differ_and_fit_a_generator() -> None:
    numbers = {stream(123, purpose) for purpose in range(8)}
    assert len(numbers) == 8
    assert all(0 <= n < 2**63 for n in numbers)
