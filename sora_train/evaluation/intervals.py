"""Intervals of 95% for rates, means and medians, and of paired differences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest

from sora_train.evaluation.metric import Summary

_RESAMPLES = 2000
_STATISTICS: dict[str, Callable[..., np.ndarray]] = {"mean": np.mean, "median": np.median, "rate": np.mean}


@dataclass(frozen=True)
class Estimate:
    """A figure over `n` videos with its 95% interval; NaN for no videos."""

    value: float
    low: float
    high: float
    n: int


def estimate(values: Sequence[float], summary: Summary) -> Estimate:
    """Summarise independent figures of videos. NaNs (the video doesn't have the figure) are left out."""
    known = np.array([v for v in values if not np.isnan(v)], dtype=np.float64)
    if not len(known):
        return Estimate(float("nan"), float("nan"), float("nan"), 0)
    if summary == "rate":
        return Estimate(float(known.mean()), *wilson(int(known.sum()), len(known)), len(known))
    return bootstrap(known, summary)


def bootstrap(values_N: np.ndarray, summary: Summary) -> Estimate:
    """Mean or median with its 95% bootstrap interval: percentiles of 2,000 resamples with a fixed seed.

    B. Efron, "Bootstrap methods: another look at the jackknife", Annals of Statistics 7 (1979).
    """
    statistic = _STATISTICS[summary]
    drawn = np.random.default_rng(0).choice(values_N, (_RESAMPLES, len(values_N)))
    low, high = np.percentile(statistic(drawn, axis=1), [2.5, 97.5], method="nearest")
    return Estimate(float(statistic(values_N)), float(low), float(high), len(values_N))


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Interval of a success rate: Wilson's score interval; (0, 1) for n = 0.

    E. B. Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927). Its coverage
    is right for small `n` and at rates of 0 and 1, where the usual normal interval has no width.
    Raises ValueError unless 0 <= successes <= n.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n}")
    if n == 0:
        return 0.0, 1.0
    found = binomtest(successes, n).proportion_ci(0.95, method="wilson")
    return float(found.low), float(found.high)


def paired_difference(ours: Sequence[float], theirs: Sequence[float]) -> Estimate:
    """Mean of the differences ours - theirs over the same videos, with its bootstrap interval.

    Raises ValueError for different numbers of videos.
    """
    differences = np.array(ours, dtype=np.float64) - np.array(theirs, dtype=np.float64)
    return estimate(differences.tolist(), "mean")
