"""Kernel and Frechet distances against closed forms and other implementations, their floors, and what they see."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.linalg import sqrtm

from sora_train.core.cli import InputError
from sora_train.evaluation.distances import (
    FixedNetwork,
    between,
    distance_on,
    distances_json,
    distances_table,
    frechet_distance,
    kernel_distance,
    measure_distances,
)
from sora_train.evaluation.metric import Sample
from sora_train.evaluation.paired import distances_side_by_side
from sora_train.evaluation.results import REAL, SAMPLES, Judged

RNG = np.random.default_rng(0)
DISTANCE = distance_on("test", lambda video, sample: video.reshape(-1)[:6].astype(float))


@pytest.mark.parametrize("n", [5, 40], ids=["fewer than features", "more"])
def test_frechet_equals_its_definition(n: int) -> None:
    """As cd-fvd and pytorch-fid compute it: means, np.cov, and scipy's root of the product of the covariances."""
    a, b = RNG.normal(size=(n, 12)), RNG.normal(0.5, 2.0, size=(n + 1, 12))
    covariances = [np.cov(x, rowvar=False) for x in (a, b)]
    root = sqrtm(covariances[0] @ covariances[1] + 1e-14 * np.eye(12))
    wanted = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root.real)
    assert frechet_distance(a, b) == pytest.approx(wanted, abs=1e-4)
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-9)


def test_frechet_of_a_shift_is_its_square() -> None:
    a = RNG.normal(size=(50, 4))
    assert frechet_distance(a, a + np.array([3.0, 0.0, 4.0, 0.0])) == pytest.approx(25.0, abs=1e-6)
    assert frechet_distance(a, 3.0 * (a - a.mean(0)) + a.mean(0)) == pytest.approx(4 * a.var(0, ddof=1).sum(), abs=1e-6)


def test_kernel_distance_equals_torchmetrics() -> None:
    torch = pytest.importorskip("torch")
    kid = pytest.importorskip("torchmetrics.image.kid")
    a, b = RNG.normal(size=(20, 8)), RNG.normal(0.3, 1.0, size=(20, 8))
    assert kernel_distance(a, b) == pytest.approx(
        float(kid.poly_mmd(torch.from_numpy(a), torch.from_numpy(b))), abs=1e-9
    )


def test_kernel_distance_is_unbiased() -> None:
    found = np.array([kernel_distance(*RNG.normal(size=(2, 16, 6))) for _ in range(200)])
    assert abs(found.mean()) < 2 * found.std(ddof=1) / np.sqrt(len(found))
    biased = np.array([frechet_distance(*RNG.normal(size=(2, 16, 6))) for _ in range(50)])
    assert biased.mean() > 1.0, "which is why the Frechet distance comes with a floor"


def test_a_distance_has_n_an_interval_and_a_floor() -> None:
    real = RNG.normal(size=(40, 6))
    kernel, frechet = between(DISTANCE, RNG.normal(1.0, 1.0, size=(40, 6)), real)
    assert kernel.name == "test_kernel" and kernel.made.n == kernel.floor.n == 20
    assert kernel.made.low > kernel.floor.high and kernel.floor.low < 0 < kernel.floor.high
    assert frechet.made.value > frechet.floor.value > 0.3, "real from real isn't 0"
    alike = between(DISTANCE, RNG.normal(size=(40, 6)), real)[0]
    assert alike.made.low < alike.floor.value < alike.made.high
    assert between(DISTANCE, real[:7], real) == []


def test_intervals_hold_the_true_kernel_distance() -> None:
    truth = np.mean([kernel_distance(*(RNG.normal(size=(2, 400, 4)) + [[[0.0]], [[0.5]]])) for _ in range(10)])
    held = 0
    for _ in range(40):
        figure = between(DISTANCE, RNG.normal(0.5, 1, size=(40, 4)), RNG.normal(size=(40, 4)))[0]
        held += figure.made.low <= truth <= figure.made.high
    assert held >= 34


def test_distances_of_other_numbers_are_not_compared() -> None:
    def evaluation(n: int) -> dict[str, object]:
        videos = [Judged(str(i), "", {}, {"test": RNG.normal(size=6).tolist()}) for i in range(n)]
        return {"distances": distances_json(measure_distances([DISTANCE], {SAMPLES: videos, REAL: videos}))}

    first, second = evaluation(20), evaluation(20)
    table = distances_side_by_side(first, second)
    assert table is not None and table.row_count == 2
    with pytest.raises(InputError, match="test_kernel of 10 and of 15 videos can't be compared"):
        distances_side_by_side(first, evaluation(30))
    assert distances_table({}).row_count == 0


def test_the_fixed_network_is_the_same_everywhere_and_takes_any_video() -> None:
    network, sample = FixedNetwork(), Sample("a")
    video = np.random.default_rng(1).integers(0, 256, (9, 32, 48, 3), dtype=np.uint8)
    features = network.features(video, sample)
    assert features.shape == (192,) and (features == FixedNetwork().features(video, sample)).all()
    assert features[:3] == pytest.approx(network.features(video.copy(), sample)[:3])
    assert np.abs(network.features(video[::-1], sample) - features).max() > 1e-3, "it sees time"
    assert network.features(video[:1], sample).shape == (192,)
