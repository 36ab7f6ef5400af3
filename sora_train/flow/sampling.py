"""From noise to latents: the flow's ODE from t = 1 to t = 0, with classifier-free guidance (Ho and Salimans 2022)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sora_train.batch import Grid, LatentPack, Layout
from sora_train.config import FlowConfig
from sora_train.flow.patches import patchify, unpatchify
from sora_train.flow.prediction import velocity
from sora_train.flow.rectified import Tokenize, shifted


@dataclass(frozen=True)
class Request:
    """One clip to generate. `given_CTHW`: latents of its first frames, kept as they are (image or video prompt)."""

    caption: str
    grid: Grid
    seed: int
    given_CTHW: Tensor | None = None


@torch.no_grad()
def generate(
    network: nn.Module,
    requests: Sequence[Request],
    config: FlowConfig,
    channels: int,
    patch: int,
    tokenize: Tokenize,
    device: torch.device,
) -> list[Tensor]:
    """Normalised latents `(C, T, H, W)` of each request. A request's result doesn't depend on its neighbours' seeds."""
    noise = [_noise(request, channels, patch) for request in requests]
    x_NP = torch.cat(noise).to(device)
    given_N = torch.cat([_given_mask(request) for request in requests]).to(device)
    known_NP = torch.cat([_known(request, channels, patch) for request in requests]).to(device)
    flow = _Flow(network, requests, tokenize, given_N, config, device)
    times = [shifted(1.0 - k / config.sampling_steps, config.shift) for k in range(config.sampling_steps + 1)]
    x_NP = torch.where(given_N.unsqueeze(1), known_NP, x_NP)
    for now, then in zip(times, times[1:], strict=False):
        velocity = flow.velocity(x_NP, now)
        if config.solver == "heun" and then > 0.0:
            velocity = (velocity + flow.velocity(x_NP + (then - now) * velocity, then)) / 2
        x_NP = torch.where(given_N.unsqueeze(1), known_NP, x_NP + (then - now) * velocity)
    sizes = [math.prod(request.grid) for request in requests]
    return [unpatchify(x, r.grid, patch) for x, r in zip(x_NP.split(sizes), requests, strict=True)]


class _Flow:
    """The guided velocity field of a batch of requests: conditional and unconditional clips in one pack."""

    def __init__(
        self,
        network: nn.Module,
        requests: Sequence[Request],
        tokenize: Tokenize,
        given_N: Tensor,
        config: FlowConfig,
        device: torch.device,
    ) -> None:
        self.network, self.guidance, self.prediction = network, config.guidance, config.prediction
        self.copies = 1 if self.guidance == 1.0 else 2
        captions = [r.caption for r in requests] + [""] * len(requests) * (self.copies - 1)
        ids_L, texts = tokenize(captions)
        self.text = ids_L.to(device)
        self.layout = Layout(tuple(r.grid for r in requests) * self.copies, texts)
        clips = len(captions)
        self.clip_of_M = torch.arange(clips, device=device).repeat_interleave(2)
        lengths = torch.tensor(self.layout.lengths, device=device)
        clip_of_N = torch.arange(clips, device=device).repeat_interleave(lengths)
        self.place_N = 2 * clip_of_N + (~given_N).long().repeat(self.copies)  # each clip's t: 0 if given, or the step's

    def velocity(self, x_NP: Tensor, t: float) -> Tensor:
        """Velocity at time t, `(N, P)` fp32."""
        x = x_NP.repeat(self.copies, 1)
        t_M = torch.tensor([0.0, t], device=x.device).repeat(len(self.layout.grids))
        unused = x.new_zeros(0)
        pack = LatentPack(self.layout, x, unused, unused, t_M, self.place_N, unused, self.text, self.clip_of_M)
        v = velocity(self.prediction, self.network(pack), pack)
        if self.copies == 1:
            return v
        conditional, unconditional = v.chunk(2)
        return unconditional + self.guidance * (conditional - unconditional)


def _noise(request: Request, channels: int, patch: int) -> Tensor:
    frames, height, width = request.grid
    generator = torch.Generator().manual_seed(request.seed)
    return patchify(torch.randn(channels, frames, height * patch, width * patch, generator=generator), patch)


def _given_mask(request: Request) -> Tensor:
    frames, height, width = request.grid
    given = 0 if request.given_CTHW is None else request.given_CTHW.shape[1]
    return (torch.arange(frames) < given).repeat_interleave(height * width)


def _known(request: Request, channels: int, patch: int) -> Tensor:
    frames, height, width = request.grid
    known = torch.zeros(channels, frames, height * patch, width * patch)
    if request.given_CTHW is not None:
        known[:, : request.given_CTHW.shape[1]] = request.given_CTHW.cpu()
    return patchify(known, patch)
