"""A rank of test_muon.py: steps under ZeRO against the same steps of one process without DeepSpeed."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sora_train.config.schema import MuonConfig, OptimConfig, Precision
from sora_train.core.world import from_environment
from sora_train.methods.base import Network
from sora_train.training.engine import muon
from sora_train.training.engine.optim import optimizer_of
from sora_train.training.engine.process_group import connect
from sora_train.training.engine.zero import Pace
from tests import stubs

STEPS = 20
OPTIM = OptimConfig(lr=0.01, matrices="muon", muon=MuonConfig(lr=0.05, weight_decay=0.1))
calls = 0


def network() -> nn.Module:
    """An embedding, two blocks of matrices of unlike shapes and a convolution, and a head."""
    torch.manual_seed(0)
    block = (nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 12))
    other = (nn.Linear(12, 12), nn.Conv1d(8, 8, 3, padding=1))
    return nn.Sequential(nn.Linear(6, 12), nn.Sequential(*block), nn.Sequential(*other), nn.Linear(12, 3))


def inputs() -> list[Tensor]:
    """What both ranks see in each step."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 8, 6, generator=generator) for _ in range(STEPS)]


def counted(matrices: list[Tensor]) -> list[Tensor]:
    global calls
    calls += len(matrices)
    return plain(matrices)


plain, muon.orthogonal = muon.orthogonal, counted


def alone() -> dict[str, Tensor]:
    """The weights after all steps, by the formulas, one matrix at a time."""
    made = network()
    names = dict(made.named_parameters())
    matrices = {name for name in names if name.endswith("weight") and name[0] in "12"}
    rest = [
        {"params": [p for name, p in names.items() if name not in matrices and (p.ndim == 2) == decays],
         "weight_decay": OPTIM.weight_decay * decays}
        for decays in (True, False)
    ]  # fmt: skip
    adam = torch.optim.AdamW(rest, lr=OPTIM.lr, betas=OPTIM.betas, eps=OPTIM.eps)
    momentum = {name: torch.zeros_like(names[name]) for name in matrices}
    for x in inputs():
        (made(x).square().sum() / 16).backward()
        adam.step()
        for name, m in momentum.items():
            p, settings = names[name], OPTIM.muon
            m.mul_(settings.momentum).add_(p.grad, alpha=1 - settings.momentum)
            update = plain([((1 - settings.momentum) * p.grad + settings.momentum * m).flatten(1)])[0]
            p.data *= 1 - settings.lr * settings.weight_decay
            p.data -= settings.lr * 0.2 * max(update.shape) ** 0.5 * update.view_as(p)
        made.zero_grad()
    return {name: p.detach() for name, p in names.items()}


def shared(stage: int) -> dict[str, Tensor]:
    """The same by the ranks, each with its part of the inputs."""
    made, rank = network(), dist.get_rank()
    options = {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}}
    optimizer = optimizer_of(Network(made, [(made, 1.0)], matrices=[made[1], made[2]]), OPTIM)
    engine = stubs.engine(made, optimizer, Precision.fp32, 1, 1e9, options)
    for x in inputs():
        engine.pace = Pace(16.0)
        engine.backward(engine(x[rank :: dist.get_world_size()]).square().sum())
        assert engine.step()
    kinds = {f.name.removeprefix("net/"): set(f.states) for f in engine.fragments}
    for name, states in kinds.items():
        muons = name.endswith("weight") and name[0] in "12"
        assert states == ({"exp_avg"} if muons else {"exp_avg", "exp_avg_sq"}), (name, states)
    weights = {name.removeprefix("net/"): torch.zeros(shape).flatten() for name, shape in engine.shapes.items()}
    for f in engine.fragments:
        weights[f.name.removeprefix("net/")][f.start : f.start + f.master.numel()] = f.master
    for values in weights.values():
        if stage:
            dist.all_reduce(values)
    return {name: values.view(engine.shapes[f"net/{name}"]) for name, values in weights.items()}


def main(stages: list[int]) -> None:
    """Each stage in turn."""
    global calls
    connect(from_environment())
    expected = alone()
    start = dict(network().named_parameters())
    for stage in stages:
        calls = 0
        for name, values in shared(stage).items():
            difference = (values - expected[name]).abs().max()
            assert difference <= 1e-5, (stage, name, difference)
            assert (expected[name] - start[name]).abs().max() > (0.05 if values.ndim > 1 else 1e-3), name
        total = torch.tensor(calls)
        dist.all_reduce(total)
        assert int(total) == 4 * STEPS, "every matrix of a block once a step, on one rank"
        if dist.get_rank() == 0:
            print(f"stage {stage}: as by one process", flush=True)


main([int(stage) for stage in sys.argv[1:]])
