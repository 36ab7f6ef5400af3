"""Verdicts on steps: what counts as bad, how many in a row, which steps of the plan are guilty, and drifting ranks."""

from __future__ import annotations

import json
import math

import pytest
import torch

from sora_train.config.schema import GuardConfig
from sora_train.training.health.spikes import Health, Verdict, differing_ranks

pytestmark = pytest.mark.usefixtures("process_group")
LIMITS = GuardConfig(max_bad_steps=3, spike=10.0, spike_steps=2, spike_window=30, leave_out_before=1)


def noise(step: int) -> float:
    return 1.0 + 0.05 * math.sin(7.0 * step)


def run(health: Health, losses: list[float], first: int = 1, applied: bool = True) -> list[Verdict | None]:
    return [
        health.judge(first + n, (0, 0, first + n - 1), loss, applied and math.isfinite(loss))
        for n, loss in enumerate(losses)
    ]


def test_a_noisy_falling_loss_is_healthy() -> None:
    losses = [3.0 * noise(step) / (1 + step / 50) for step in range(1, 300)]
    assert not any(run(Health(LIMITS), losses))


def test_a_single_high_loss_is_no_spike_but_two_in_a_row_are() -> None:
    health = Health(LIMITS)
    assert not any(run(health, [noise(s) for s in range(1, 41)]))
    assert run(health, [50.0, 1.0], first=41) == [None, None]
    low, verdict = run(health, [50.0, 60.0], first=43)
    assert low is None and verdict is not None
    assert (verdict.first, verdict.guilty) == (43, ((42, (0, 0, 41)), (43, (0, 0, 42)), (44, (0, 0, 43))))
    assert "steps 43 to 44" in verdict.reason and "60" in verdict.reason


def test_the_first_losses_of_a_run_and_spike_0_are_never_spikes() -> None:
    assert not any(run(Health(LIMITS), [1.0] * 10 + [1e6] * 5))
    off = GuardConfig(spike=0.0, spike_steps=1)
    assert not any(run(Health(off), [1.0] * 50 + [1e6] * 5))


def test_a_constant_loss_has_no_deviation_and_still_no_spike_at_the_next_bit() -> None:
    assert not any(run(Health(LIMITS), [1.0] * 40 + [1.1, 1.1, 1.1]))


def test_steps_that_are_not_finite_are_counted_in_a_row() -> None:
    health = Health(LIMITS)
    nan = math.nan
    assert not any(run(health, [1.0, nan, nan, 1.0, nan, nan]))
    (verdict,) = run(health, [math.inf], first=7)
    assert verdict is not None and verdict.first == 5
    assert [step for step, _ in verdict.guilty] == [4, 5, 6, 7]


def test_a_gradient_that_is_not_finite_counts_though_the_loss_is() -> None:
    verdicts = run(Health(LIMITS), [1.0] * 3, applied=False)
    assert verdicts[:2] == [None, None] and verdicts[2] is not None


def test_a_resumed_run_judges_like_an_undisturbed_one() -> None:
    losses = [noise(s) for s in range(1, 36)] + [40.0, 50.0]
    whole = run(Health(LIMITS), losses)[-1]
    first, second = Health(LIMITS), Health(LIMITS)
    run(first, losses[:36])
    second.restore(json.loads(json.dumps(first.state())))
    assert run(second, losses[36:], first=37) == [whole]
    assert whole is not None


def test_one_rank_alone_differs_from_nobody() -> None:
    assert differing_ranks(torch.tensor([1, 2, 3])) == []


@pytest.mark.parametrize(
    ("rows", "odd"),
    [
        ([[1, 2], [1, 2], [1, 2]], []),
        ([[1, 2], [1, 3], [1, 2]], [1]),
        ([[1, 2], [1, 3]], [1]),
        ([[9, 9], [1, 3], [1, 3]], [0]),
    ],
)
def test_the_rank_that_is_not_like_the_others_is_named(
    rows: list[list[int]], odd: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sora_train.training.health import spikes as health

    everyone = torch.tensor(rows)

    def all_reduce(bounds: torch.Tensor, op: object) -> None:
        bounds.copy_(torch.cat((everyone, -everyone), 1).amax(0))

    def all_gather(into: list[torch.Tensor], mine: torch.Tensor) -> None:
        for row, values in zip(into, everyone, strict=True):
            row.copy_(values)

    monkeypatch.setattr(health.dist, "get_world_size", lambda: len(rows))
    monkeypatch.setattr(health.dist, "all_reduce", all_reduce)
    monkeypatch.setattr(health.dist, "all_gather", all_gather)
    assert differing_ranks(everyone[0]) == odd
