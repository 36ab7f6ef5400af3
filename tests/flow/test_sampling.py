"""Sampling: a known field leads exactly to its data, what is given comes back as it was, neighbours don't matter."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from sora_train.batch import LatentPack
from sora_train.config import FlowConfig
from sora_train.flow.patches import patchify, unpatchify
from sora_train.flow.sampling import Request, _noise, generate
from sora_train.models.dit import DiT
from sora_train.models.text import TextEncoder, tokenize_captions
from sora_train.models.video_model import VideoModel

CPU = torch.device("cpu")
GRIDS = ((3, 2, 2), (1, 3, 2), (2, 2, 4))
FLOW = FlowConfig(shift=2.0, sampling_steps=7, guidance=3.0)


def latents(grid: tuple[int, int, int], seed: int) -> Tensor:
    return torch.randn(4, grid[0], 2 * grid[1], 2 * grid[2], generator=torch.Generator().manual_seed(seed))


def run(network: nn.Module, requests: list[Request], flow: FlowConfig = FLOW) -> list[Tensor]:
    return generate(network, requests, flow, 4, 2, lambda texts: tokenize_captions(texts, 64, 32), CPU)


class Field(nn.Module):
    """A velocity that is known: `formula` of x, the time of each token, and whether its clip has a caption."""

    def __init__(self, formula: object) -> None:
        super().__init__()
        self.formula, self.times = formula, []

    def forward(self, pack: LatentPack) -> Tensor:
        t_N1 = pack.t_M[pack.t_of_N].unsqueeze(1)
        told = torch.tensor([n > 1 for n in pack.layout.texts]).repeat_interleave(torch.tensor(pack.layout.lengths))
        self.times.append(pack.t_M.max().item())
        return self.formula(pack.x_NP, t_N1, told.unsqueeze(1).float())  # type: ignore[operator]


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 7])
def test_the_field_of_known_data_leads_to_that_data(solver: str, guidance: float, steps: int) -> None:
    """Where all noise flows to one x0, the velocity at (x, t) is (x - x0) / t, and its paths are straight."""
    wanted = [latents(grid, n) for n, grid in enumerate(GRIDS)]
    x0 = torch.cat([patchify(x, 2) for x in wanted]).repeat(1 if guidance == 1.0 else 2, 1)
    flow = replace(FLOW, solver=solver, guidance=guidance, sampling_steps=steps)
    field = Field(lambda x, t, told: (x - x0) / t)
    results = run(field, [Request("x", grid, 5 + n) for n, grid in enumerate(GRIDS)], flow)
    for result, target in zip(results, wanted, strict=True):
        torch.testing.assert_close(result, target, rtol=1e-4, atol=1e-4)


def test_times_go_from_noise_to_data_along_the_shift() -> None:
    field = Field(lambda x, t, told: 0 * x)
    run(field, [Request("x", GRIDS[0], 0)], replace(FLOW, sampling_steps=4))
    assert field.times == pytest.approx([1.0, 2 * 0.75 / 1.75, 2 / 3, 0.4])


def test_guidance_goes_beyond_the_conditional_velocity() -> None:
    request = Request("a caption", GRIDS[0], 3)
    noise = unpatchify(_noise(request, 4, 2), request.grid, 2)
    for guidance, moved in ((1.0, 1.0), (3.0, 3.0), (0.0, 0.0)):
        (result,) = run(Field(lambda x, t, told: told.expand_as(x)), [request], replace(FLOW, guidance=guidance))
        torch.testing.assert_close(result, noise - moved, rtol=1e-5, atol=1e-5)


def test_heun_is_of_second_order_and_euler_of_first() -> None:
    """dx/dt = x from t = 1 to 0 ends at noise / e."""
    request = Request("", GRIDS[1], 3)
    target = unpatchify(_noise(request, 4, 2), request.grid, 2) / math.e
    error = {}
    for solver in ("euler", "heun"):
        for steps in (8, 16):
            flow = replace(FLOW, solver=solver, sampling_steps=steps, guidance=1.0, shift=1.0)
            (result,) = run(Field(lambda x, t, told: x), [request], flow)
            error[solver, steps] = (result - target).abs().max().item()
    assert error["euler", 8] / error["euler", 16] == pytest.approx(2, rel=0.15)
    assert error["heun", 8] < 0.1 * error["euler", 8]


@pytest.fixture(scope="module")
def model() -> VideoModel:
    torch.manual_seed(0)
    network = VideoModel(DiT(16, 24, 2, 2, 48, 16), TextEncoder(16, 1, 2, 64, 32))
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return network.eval()


@pytest.mark.parametrize("given", [1, 2])
def test_given_frames_come_back_exactly_and_the_rest_depends_on_them(model: VideoModel, given: int) -> None:
    known = latents((given, 2, 2), 9)
    (with_it,) = run(model, [Request("a clip", GRIDS[0], 3, known)])
    (other,) = run(model, [Request("a clip", GRIDS[0], 3, known + 1.0)])
    assert torch.equal(with_it[:, :given], known)
    assert torch.equal(other[:, :given], known + 1.0)
    assert (with_it[:, given:] - other[:, given:]).abs().max() > 1e-3


def test_a_result_does_not_depend_on_its_neighbours(model: VideoModel) -> None:
    requests = [
        Request(f"clip {n}", grid, n, latents((1, *grid[1:]), 4) if n == 2 else None) for n, grid in enumerate(GRIDS)
    ]
    together = run(model, requests)
    for request, result in zip(requests, together, strict=True):
        torch.testing.assert_close(run(model, [request])[0], result, rtol=1e-3, atol=1e-3)


def test_the_seed_is_the_noise(model: VideoModel) -> None:
    one, same, other = (run(model, [Request("x", GRIDS[0], seed)])[0] for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.allclose(one, other, atol=0.1)
