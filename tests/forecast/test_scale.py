"""Collectives on many ranks by value, and the benchmark that holds the model against four ranks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from omegaconf import DictConfig

from benchmarks import collectives
from sora_train.config.load import build
from sora_train.config.schema import Config
from sora_train.forecast.estimate import Estimate
from sora_train.forecast.hardware import GPUS
from sora_train.forecast.scale import RANKS, AlphaBeta, fit, scaled, waiting
from sora_train.forecast.trace import Made, Operation, Trace

PASS = Trace(1000, (Made(800, 700, 600),), 200, 40, (Operation("matmul", 10**14, 10**6, False),))


@pytest.fixture
def config(compose_tree: Callable[..., DictConfig]) -> Config:
    return build(compose_tree("experiment=demo", "precision=bf16"), need_vae=False)


@pytest.mark.parametrize("times", [1, 2])
def test_the_fit_finds_what_made_the_times(times: int) -> None:
    true = AlphaBeta(5e-5, 2e-5, 1e-9)
    sizes = [(ranks, float(nbytes)) for ranks in (2, 3) for nbytes in (8, 10**5, 10**7)]
    taken = true.gather if times == 1 else true.all_reduce
    found = fit([(r, n, taken(n, r)) for r, n in sizes], times)
    assert (found.call, found.alpha, found.beta) == pytest.approx((5e-5, 2e-5, 1e-9), rel=1e-5)
    assert true.all_reduce(4e6, 4) == pytest.approx(5e-5 + 2 * (3 * 2e-5 + 3e6 * 1e-9))


def test_what_waits_in_rings_grows_with_the_ranks(config: Config) -> None:
    config.deepspeed = {"zero_optimization": {"stage": 1, "reduce_bucket_size": 10**8}}
    ring = 8.4e-6 + (64 - 8) * 3.4e-6 + 7 * 14e-6
    assert waiting(config, 10**9, 2, 1, 64, 8) == pytest.approx((10 * 2 + 4 + 2) * ring)
    assert waiting(config, 10**9, 2, 3, 64, 8) == pytest.approx((10 * 2 + 20 * 2 * 2 + 2) * ring)  # kept no longer
    assert waiting(config, 10**9, 1, 1, 16384, 8) > 100 * waiting(config, 10**9, 1, 1, 64, 8)


def test_more_ranks_cost_efficiency_and_goodput(config: Config) -> None:
    figures = Estimate(64, 10**10, 0, 2, 0.0, 10**15, None, None, None, None, None)
    rows = scaled(config, figures, PASS, 1.0, GPUS["h100"], 8, disk=1e10, hours_per_failure=50_000)
    assert [row.ranks for row in rows] == list(RANKS)
    for less, more in zip(rows, rows[1:], strict=False):
        assert more.step > less.step and more.efficiency < less.efficiency and more.goodput < less.goodput
        assert more.ring > 3 * less.ring and more.tree < 2 * less.tree and more.written == less.written
    assert rows[0].goodput > 0.99 and rows[-1].goodput < 0.99
    assert rows[0].step > rows[0].collectives > rows[0].waiting > 0


@pytest.mark.campaign
def test_collectives_are_measured_and_forecast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collectives, "SIZES", (1 << 10, 1 << 16))
    for kind in collectives.KINDS:
        found, table = collectives.rows(kind, rounds=1)
        assert found.alpha + found.beta > 0 and [row[1] for row in table] == ["1 KiB", "64 KiB"]
        assert all(float(row[2]) > 0 for row in table)
