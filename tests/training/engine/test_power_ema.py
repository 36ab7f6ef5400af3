"""Averages of several lengths are what the paper's formula says, ride in checkpoints, and make any other length."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from sora_train.core.cli import InputError
from sora_train.training.engine.fragments import Fragment
from sora_train.training.engine.power_ema import PowerEmas, Snapshots, combination, combined, gamma_of, kind_of, thinned
from sora_train.training.state.checkpoint import Checkpoints
from sora_train.training.state.checkpoint_format import load_into, pieces, read_state
from tests import stubs

LENGTHS = [0.05, 0.1]


def fragment(numel: int = 50) -> Fragment:
    return stubs.fragment("net/w", torch.zeros(numel))


def course(steps: int, numel: int = 50) -> torch.Tensor:
    """Weights of each step that wander and drift, fp32."""
    noise = torch.randn(steps, numel, generator=torch.Generator().manual_seed(3))
    return noise.cumsum(0) / steps**0.5 + torch.linspace(0, 1, steps)[:, None]


def direct(weights: torch.Tensor, length: float) -> torch.Tensor:
    """The average after all of the steps, by the recursion of the paper in fp64."""
    average = weights[0].double()
    for step, values in enumerate(weights[1:].double(), start=2):
        decay = (1 - 1 / step) ** (gamma_of(length) + 1)
        average = decay * average + (1 - decay) * values
    return average


def run(part: Fragment, emas: PowerEmas, weights: torch.Tensor) -> None:
    for values in weights:
        part.master.copy_(values)
        emas.update()


def test_the_exponents_are_the_papers() -> None:
    assert gamma_of(0.05) == pytest.approx(16.97, abs=0.01) and gamma_of(0.1) == pytest.approx(6.94, abs=0.01)
    for length in (0.01, 0.07, 0.2, 0.28):
        gamma = gamma_of(length)
        assert (gamma + 1) ** 0.5 / ((gamma + 2) * (gamma + 3) ** 0.5) == pytest.approx(length, rel=1e-9)


@pytest.mark.parametrize("length", [0.02, 0.1, 0.25])
def test_an_average_weighs_steps_by_a_power(length: float) -> None:
    """The recursion against the definition: weights tau^gamma of all steps, normalised."""
    part, weights = fragment(), course(1000)
    emas = PowerEmas([part], [length])
    run(part, emas, weights)
    tau = torch.arange(1, 1001, dtype=torch.float64) ** gamma_of(length)
    defined = (tau / tau.sum()) @ weights.double()
    got = emas.values[kind_of(length)]["net/w"].double()
    torch.testing.assert_close(got, direct(weights, length), rtol=0, atol=1e-5)
    assert (got - defined).norm() / defined.norm() < 0.01, "but for the sum in place of the integral"


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("length", [0.04, 0.05, 0.07, 0.1, 0.13])
def test_snapshots_make_any_length(tmp_path: Path, length: float) -> None:
    part, weights = fragment(), course(2000)
    emas = PowerEmas([part], LENGTHS)
    snapshots = Snapshots(tmp_path, emas, 100, 64)
    for step in range(100, 2001, 100):
        run(part, emas, weights[step - 100 : step])
        snapshots.save(step, [part], None, {"net/w": [50]})
        snapshots.settle()
    assert snapshots.wait()
    made, step, error = combined(tmp_path, length)
    wanted = direct(weights, length)
    off = ((made["w"].double() - wanted).norm() / wanted.norm()).item()
    print(f"length {length}: the weights are off by {off:.1e}, the weighting by {error:.1e}")
    kept = length in LENGTHS
    assert step == 2000 and off < (1e-6 if kept else 5e-4) and error < (1e-6 if kept else 0.01)


def test_a_length_out_of_reach_is_told_by_its_error() -> None:
    at = [(float(step), length) for step in range(250, 2001, 250) for length in LENGTHS]
    assert combination(at, 0.07, 2000.0)[1] < 0.02 < 0.3 < combination(at, 0.005, 2000.0)[1]
    factors, error = combination(at, 0.1, 2000.0)
    assert factors[-1] == pytest.approx(1.0, abs=1e-3) and error < 1e-6


@pytest.mark.usefixtures("process_group")
def test_they_are_resumed_to_the_bit(tmp_path: Path) -> None:
    part, weights = fragment(), course(300)
    emas, single = PowerEmas([part], LENGTHS), {"net/w": torch.zeros(50)}
    run(part, emas, weights[:150])
    checkpoints = Checkpoints(tmp_path, 1)
    checkpoints.save(150, pieces([part], single, None, emas.values), {"step": 150, **emas.state()})
    assert checkpoints.wait()
    run(part, emas, weights[150:])
    again_part = fragment()
    again, path = PowerEmas([again_part], LENGTHS), tmp_path / "step-00000150"
    again.restore(read_state(path))
    load_into(path, pieces([again_part], single, None, again.values))
    run(again_part, again, weights[150:])
    assert again.updates == emas.updates == 300
    assert all(torch.equal(again.values[kind]["net/w"], emas.values[kind]["net/w"]) for kind in emas.values)
    with pytest.raises(InputError, match=r"length 0.2 can't begin in the middle"):
        PowerEmas([part], [0.1, 0.2]).restore(read_state(path))


def test_nothing_is_kept_or_saved_without_lengths() -> None:
    part = fragment()
    emas = PowerEmas([part], [])
    emas.update()
    assert emas.values == {} and emas.state() == {}
    assert set(pieces([part], {"net/w": part.master}, None, emas.values)) == {
        "master/net/w", "exp_avg/net/w", "exp_avg_sq/net/w", "ema/net/w"
    }  # fmt: skip


@pytest.mark.usefixtures("process_group")
def test_the_snapshots_that_stay_are_spread_over_the_run(tmp_path: Path) -> None:
    part = fragment()
    snapshots = Snapshots(tmp_path, PowerEmas([part], [0.1]), 10, 4)
    for step in range(10, 131, 10):
        snapshots.emas.update()
        snapshots.save(step, [part], None, {"net/w": [50]})
        assert snapshots.wait()
        there = sorted(path.name for path in (tmp_path / "snapshots").iterdir())
        assert len(there) <= 4 and there[-1] == f"step-{step:08d}"
    assert there == ["step-00000040", "step-00000080", "step-00000120", "step-00000130"]
    snapshots.discard_after(80)
    assert len(list((tmp_path / "snapshots").iterdir())) == 2
    assert thinned([], 10, 3) == set() and thinned([10, 20, 30], 10, 3) == {10, 20, 30}
    with pytest.raises(InputError, match=r"optim.ema_lengths=\[0.05,0.1\]"):
        combined(tmp_path / "nothing", 0.1)
    assert np.isfinite(combined(tmp_path, 0.1)[2])
