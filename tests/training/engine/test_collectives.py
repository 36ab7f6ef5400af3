"""Gradients are sent in order while the backward pass runs, and one norm stands for all that DeepSpeed looks for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sora_train.training.engine import collectives
from sora_train.training.engine.collectives import Buckets


class _Twins:
    """All-reduces of two ranks that hold the same numbers; the sum is there once it was waited for."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def all_reduce(self, values: Tensor, async_op: bool) -> SimpleNamespace:
        assert async_op
        self.sizes.append(values.numel())
        return SimpleNamespace(wait=lambda: values.mul_(2.0))


@pytest.fixture
def twins(monkeypatch: pytest.MonkeyPatch) -> _Twins:
    made = _Twins()
    monkeypatch.setattr(collectives, "dist", made)
    return made


def test_gradients_are_sent_as_they_come_in_the_last_pass_alone(twins: _Twins) -> None:
    torch.manual_seed(0)
    network, spare = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3)), nn.Linear(2, 2)
    plain = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))
    plain.load_state_dict(network.state_dict())
    parameters = [*spare.parameters(), *network.parameters()]  # the first has no gradient in any pass
    buckets = Buckets(parameters, limit=4 * 27)
    sent_by: list[int] = []
    network[0].weight.register_hook(lambda _: sent_by.append(len(twins.sizes)))
    passes = torch.randn(2, 5, 4)
    for number, x in enumerate(passes):
        plain(x).square().sum().backward()
        if number == 1:
            assert twins.sizes == []
            buckets.open()
        network(x).square().sum().backward()
    # before the first weight has its gradient: that of its bias may come before or after it
    assert sent_by[0] == 0 and sent_by[1] in (1, 2) and twins.sizes == [27, 8, 32]
    flats = buckets.close()
    assert twins.sizes == [27, 8, 32, 6]
    for mine, theirs in zip(network.parameters(), plain.parameters(), strict=True):
        assert mine.grad is not None and theirs.grad is not None
        torch.testing.assert_close(mine.grad, 2.0 * theirs.grad)
        assert any(flat.untyped_storage().data_ptr() == mine.grad.untyped_storage().data_ptr() for flat in flats)
    assert torch.equal(spare.weight.grad, torch.zeros(2, 2))  # type: ignore[arg-type]
    network(passes[0]).square().sum().backward()
    assert len(twins.sizes) == 4  # closed


def _optimizer(*groups: list[Tensor]) -> Any:
    return SimpleNamespace(
        bit16_groups=groups, averaged_gradients=dict(enumerate(groups)), dp_process_group=None, device="cpu"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_norm_of_all_groups(dtype: torch.dtype, process_group: torch.device) -> None:
    groups = [torch.randn(7).to(dtype), torch.randn(3, 2).to(dtype)], [torch.randn(11).to(dtype)]
    whole = torch.cat([g.float().view(-1) for group in groups for g in group]).norm()
    torch.testing.assert_close(collectives._scaled_global_norm(_optimizer(*groups)), whole)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_makes_the_norm_infinite(value: float, process_group: torch.device) -> None:
    assert collectives._scaled_global_norm(_optimizer([torch.ones(4)], [torch.tensor([1.0, value])])) == float("inf")
