"""The moving average follows the masters, and validation runs with it and gives the weights back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from sora_train.config.schema import OptimConfig, Precision
from sora_train.training.engine.ema import Ema
from sora_train.training.engine.fragments import Fragment
from sora_train.training.engine.optim import adamw
from sora_train.training.engine.zero import Pace
from tests import stubs


def fragment(name: str, values: list[float]) -> Fragment:
    master = torch.tensor(values)
    return stubs.fragment(name, master)


def test_it_starts_at_the_weights_and_follows_faster_early_on() -> None:
    part = fragment("w", [0.0, 10.0])
    ema = Ema([part], decay=0.5)
    assert ema.values["w"].tolist() == [0.0, 10.0]
    part.master.copy_(torch.tensor([1.0, 10.0]))
    expected, course = 0.0, []
    for n in range(1, 21):
        ema.update()
        decay = min(0.5, n / (9 + n))
        expected = decay * expected + (1 - decay) * 1.0
        course.append(ema.values["w"][0].item() == pytest.approx(expected))
    assert all(course) and ema.updates == 20
    assert ema.values["w"][1].item() == 10.0
    assert part.master.tolist() == [1.0, 10.0], "the weights themselves are left alone"


def test_a_rank_that_owns_nothing_has_nothing_to_average() -> None:
    ema = Ema([], 0.9)
    ema.update()
    assert ema.values == {} and ema.updates == 1


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_validation_runs_with_the_average_and_training_goes_on_with_the_weights(stage: int) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    options: dict[str, Any] = {"zero_optimization": {"stage": stage}}
    optimizer = adamw([(network, 1.0)], OptimConfig(lr=0.1))
    engine = stubs.engine(network, optimizer, Precision.fp32, passes=2, clip=1e9, options=options)
    ema = Ema(engine.fragments, 0.99)
    x = torch.randn(5, 3)
    before = engine(x).detach()

    reference = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    reference.load_state_dict({name: p.detach().clone() for name, p in network.named_parameters()})
    (reference(x).square().sum() / 10 + reference(2 * x).sum() / 10).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in reference.parameters()]).item()

    engine.pace = Pace(10.0)
    engine.backward(engine(x).square().sum())
    engine.pace = Pace(10.0)
    engine.backward(engine(2 * x).sum())
    assert engine.step()
    assert engine.grad_norm == pytest.approx(norm, rel=1e-4), "the passes add up to sum / weight"
    trained = engine(x).detach()
    assert not torch.allclose(trained, before)
    with engine.weights(ema.values):
        torch.testing.assert_close(engine(x), before)
    assert torch.equal(engine(x), trained)

    engine.pace = Pace(1.0)
    engine.backward(engine(x).sum() * float("nan"))
    engine.pace = Pace(1.0)
    engine.backward(engine(x).sum())
    assert not engine.step(), "a gradient that isn't finite changes nothing"
    assert torch.equal(engine(x), trained)
