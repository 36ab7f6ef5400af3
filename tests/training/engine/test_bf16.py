"""In bf16 every ZeRO stage does what AdamW on fp32 masters does, from the first step on, whatever is frozen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sora_train.config.schema import OptimConfig, Precision
from sora_train.training.engine.optim import adamw
from sora_train.training.engine.zero import Pace
from tests import stubs

OPTIM = OptimConfig(lr=0.01, weight_decay=0.2)
CLIP = 0.5


def network(trained: str) -> nn.Sequential:
    """Two layers with what is beneath an adapter's: with `few` the first is frozen and only the last is trained."""
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(6, 32), nn.GELU(), nn.Linear(32, 4), nn.Linear(4, 3, bias=False))
    made[:3].requires_grad_(trained == "all")
    return made


def inputs() -> list[list[Tensor]]:
    """Two passes of each of four steps."""
    generator = torch.Generator().manual_seed(1)
    return [[torch.randn(8, 6, generator=generator).bfloat16() for _ in range(2)] for _ in range(4)]


def reference(trained: str) -> list[dict[str, Tensor]]:
    """Masters after each step, by torch alone."""
    made = network(trained).bfloat16()
    masters = {n: p.detach().float().requires_grad_() for n, p in made.named_parameters() if p.requires_grad}
    low = {n: p for n, p in made.named_parameters() if p.requires_grad}
    decays = [n for n in masters if n.endswith("weight")]
    groups = [
        {"params": [masters[n] for n in masters if (n in decays) == yes], "weight_decay": OPTIM.weight_decay * yes}
        for yes in (True, False)
    ]
    adam = torch.optim.AdamW([g for g in groups if g["params"]], lr=OPTIM.lr, betas=OPTIM.betas, eps=OPTIM.eps)
    course = []
    for passes in inputs():
        for x in passes:
            (made(x).float().square().sum() / 8).backward()
        for name, master in masters.items():
            master.grad = low[name].grad.float()
            low[name].grad = None
        torch.nn.utils.clip_grad_norm_(list(masters.values()), CLIP)
        adam.step()
        for name, master in masters.items():
            low[name].data.copy_(master.data)
        course.append({n: m.detach().clone() for n, m in masters.items()})
    return course


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("trained", ["all", "few"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_masters_are_those_of_adam(stage: int, trained: str) -> None:
    """Within a hundredth of a step: gradients and their sum over the passes are in bf16 everywhere."""
    made = network(trained)
    options: dict[str, Any] = {"zero_optimization": {"stage": stage}}
    engine = stubs.engine(made, adamw([(made, 1.0)], OPTIM), Precision.bf16, passes=2, clip=CLIP, options=options)
    engine.pace = Pace(8.0)
    start = {f.name.removeprefix("net/"): f.master.clone() for f in engine.fragments}
    plain = {n: p.detach().bfloat16().float() for n, p in network(trained).named_parameters() if p.requires_grad}
    assert start.keys() == plain.keys()
    assert all(torch.equal(start[n], plain[n].flatten()) for n in start), "nothing decays before the first step"
    for number, (passes, expected) in enumerate(zip(inputs(), reference(trained), strict=True)):
        for x in passes:
            engine.backward(engine(x).float().square().sum())
        assert engine.step()
        for f in engine.fragments:
            name = f.name.removeprefix("net/")
            difference = (f.master - expected[name].flatten()).abs().max()
            assert difference <= 0.01 * OPTIM.lr, (number, name, float(difference))
            assert (f.master - start[name]).abs().max() > 0.5 * OPTIM.lr
