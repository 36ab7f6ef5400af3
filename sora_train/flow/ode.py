"""From noise to latents: the flow's ODE from t = 1 to t = 0, with classifier-free guidance (Ho and Salimans 2022).

Any latent frames may be given, and stay as they are; a clip may begin from a partly noised one instead of from noise
(Meng et al. 2022, SDEdit, arXiv 2108.01073); each shot of a clip may have its own caption. A clip that goes on from
another, or leads to another, may be held to it over the frames that both have, until they are let go one after the
other. Guidance leads away from the empty caption, or from a negative prompt in its place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from sora_train.config.schema import FlowConfig
from sora_train.core.batch import Grid, LatentPack, Layout, Stream
from sora_train.flow.objective import shift_of, shifted
from sora_train.flow.patches import patchify, unpatchify
from sora_train.flow.prediction import velocity
from sora_train.flow.solvers import SOLVE

Tokenize = Callable[[Sequence[str]], tuple[Tensor, tuple[int, ...]]]  # captions to rows end to end, and their lengths


@dataclass(frozen=True)
class Held:
    """Latents `(C, T, H, W)` that a clip begins or ends with and departs from, and the noise they were made from."""

    latents_CTHW: Tensor
    noise_CTHW: Tensor
    release: bool = True  # False: all of them are held to the end


@dataclass(frozen=True)
class Request:
    """One clip to generate.

    `given`: latents `(C, T, H, W)` that are kept as they are, each with the latent frame it begins at. `start_CTHW`:
    latents of a whole clip that is noised up to t = `strength` and generated anew from there. `shots`: latent frames
    and caption of each shot, in the caption's place. `lead_CTHW`: the latent frame that a given end was encoded after,
    for whoever decodes it. `held`: what the clip is held to at its beginning, the first frame to the end, each later
    one for less of the way; unlike given frames these are noised like all others, so no model has to learn them.
    `held_end`: the same at its end, mirrored: the last frame is held to the end. `negative`: what guidance leads away
    from.
    """

    caption: str
    grid: Grid
    seed: int
    given: tuple[tuple[int, Tensor], ...] = ()
    start_CTHW: Tensor | None = None
    strength: float = 1.0
    shots: tuple[tuple[int, str], ...] = ()
    lead_CTHW: Tensor | None = None
    held: Held | None = None
    held_end: Held | None = None
    negative: str = ""


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
    """Normalised latents `(C, T, H, W)` of each request. A request's result doesn't depend on its neighbours."""
    for request in requests:
        _check(request, channels, patch)
    sizes = [math.prod(request.grid) for request in requests]
    clip_of_N = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)).to(device)
    x_NP = torch.cat([_start(request, channels, patch) for request in requests]).to(device)
    given_N1 = torch.cat([_given_mask(request) for request in requests]).unsqueeze(1).to(device)
    known_NP = torch.cat([_known(request, channels, patch) for request in requests]).to(device)
    release_N1 = torch.cat([_release(request, config) for request in requests]).unsqueeze(1).to(device)
    guided = _Guided(network, requests, tokenize, given_N1.squeeze(1), config, device)
    times = [torch.tensor(row, device=device)[clip_of_N].unsqueeze(1) for row in _times(requests, config)]

    def field(x_NP: Tensor, t_N1: Tensor) -> Tensor:
        back_NP = (x_NP - known_NP) / t_N1  # the velocity that ends in what is known
        free_NP = guided.velocity(x_NP, t_N1.squeeze(1))
        return torch.where(t_N1 > release_N1, back_NP, free_NP).masked_fill(given_N1, 0.0)

    x_NP = torch.where(given_N1, known_NP, x_NP)
    x_NP = SOLVE[config.solver](field, x_NP, times)
    return [unpatchify(x, r.grid, patch) for x, r in zip(x_NP.split(sizes), requests, strict=True)]


def _times(requests: Sequence[Request], config: FlowConfig) -> list[list[float]]:
    """The time of every request at every step: the shift's, from its strength to 0."""
    shifts, steps = [shift_of(config, request.grid) for request in requests], config.sampling_steps
    firsts = [shifted(r.strength, 1.0 / shift) for r, shift in zip(requests, shifts, strict=True)]  # before the shift
    return [
        [shifted(first * (1.0 - k / steps), shift) for first, shift in zip(firsts, shifts, strict=True)]
        for k in range(steps + 1)
    ]


class _Guided:
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
        self.network, self.config, self.given_N = network, config, given_N
        self.sizes = [math.prod(request.grid) for request in requests]
        self.packs = []
        for copies in (1, 2):
            shots = [request.shots or ((request.grid[0], request.caption),) for request in requests]
            shots += [((request.grid[0], request.negative),) for request in requests] * (copies - 1)
            text, texts = tokenize([caption for clip in shots for _, caption in clip])
            grids = tuple(request.grid for request in requests) * copies
            frames = tuple(tuple(length for length, _ in clip) for clip in shots)
            layout = Layout(grids, texts, shots=frames)
            caption_of_N = torch.arange(len(texts)).repeat_interleave(torch.tensor(layout.spans)).to(device)
            self.packs.append((layout, text.to(device), caption_of_N))

    def velocity(self, x_NP: Tensor, t_N: Tensor) -> Tensor:
        """Velocity of every token at its clip's time, `(N, P)` fp32."""
        low, high = self.config.guidance_interval
        now = [float(part[0]) for part in t_N.split(self.sizes)]
        scales = [self.config.guidance if low <= t <= high else 1.0 for t in now]
        if all(scale == 1.0 for scale in scales):
            return self._run(1, x_NP, t_N)
        conditional, unconditional = self._run(2, x_NP, t_N).chunk(2)
        return torch.cat(
            [
                self._guide(c, u, scale, given)
                for c, u, scale, given in zip(
                    conditional.split(self.sizes), unconditional.split(self.sizes), scales,
                    self.given_N.split(self.sizes), strict=True,
                )
            ]
        )  # fmt: skip

    def _guide(self, conditional: Tensor, unconditional: Tensor, scale: float, given_n: Tensor) -> Tensor:
        """One clip's guided velocity, its deviation drawn back to the conditional one's (Lin et al. 2023,
        arXiv 2305.08891, section 3.4): guidance alone makes pictures glare."""
        guided = unconditional + scale * (conditional - unconditional)
        rescale = self.config.guidance_rescale
        if rescale == 0.0 or scale == 1.0:
            return guided
        wanted, have = (v[~given_n].std(correction=0) for v in (conditional, guided))
        return guided * (1.0 - rescale + rescale * wanted / have.clamp(min=1e-8))

    def _run(self, copies: int, x_NP: Tensor, t_N: Tensor) -> Tensor:
        layout, text, caption_of_N = self.packs[copies - 1]
        x, unused = x_NP.repeat(copies, 1), x_NP.new_zeros(0)
        captions = len(layout.texts)
        t_S = t_N.new_zeros(captions).scatter(0, caption_of_N, t_N.repeat(copies))
        t_M = torch.stack((torch.zeros_like(t_S), t_S), dim=1).flatten()  # for each caption: 0 if given, or its time
        place_N = 2 * caption_of_N + (~self.given_N).long().repeat(copies)
        caption_of_M = torch.arange(captions, device=x.device).repeat_interleave(2)
        video = Stream(layout, x, unused, unused, t_M, place_N, unused, caption_of_M)
        return velocity(self.config.prediction, self.network(LatentPack({"video": video}, text)), video)


def _check(request: Request, channels: int, patch: int) -> None:
    """Raises ValueError for latents that don't fit the grid, and for shots that don't fill it."""
    frames, height, width = request.grid
    shape = (channels, height * patch, width * patch)
    start = [] if request.start_CTHW is None else [(0, request.start_CTHW)]
    for first, latents in (*request.given, *_ends(request), *start):
        if (*latents.shape[:1], *latents.shape[2:]) != shape or not 0 <= first <= frames - latents.shape[1]:
            raise ValueError(f"latents {tuple(latents.shape)} at frame {first} don't fit {request.grid} of {shape}")
    if request.shots and sum(length for length, _ in request.shots) != frames:
        raise ValueError(f"shots of {[length for length, _ in request.shots]} latent frames don't fill {frames}")


def noise_of(request: Request, channels: int, patch: int) -> Tensor:
    """The noise `(C, T, H, W)` that a request's clip is made from."""
    frames, height, width = request.grid
    generator = torch.Generator().manual_seed(request.seed)
    noise_CTHW = torch.randn(channels, frames, height * patch, width * patch, generator=generator)
    if request.held is not None:
        noise_CTHW[:, : request.held.noise_CTHW.shape[1]] = request.held.noise_CTHW
    if request.held_end is not None:
        noise_CTHW[:, frames - request.held_end.noise_CTHW.shape[1] :] = request.held_end.noise_CTHW
    return noise_CTHW


def _start(request: Request, channels: int, patch: int) -> Tensor:
    """What the clip begins from: noise, or latents with as much noise as the strength says."""
    noise = patchify(noise_of(request, channels, patch), patch)
    if request.start_CTHW is None:
        return noise
    return torch.lerp(patchify(request.start_CTHW.cpu().float(), patch), noise, request.strength)


def _given_mask(request: Request) -> Tensor:
    frames, height, width = request.grid
    places = set(chain.from_iterable(range(first, first + latents.shape[1]) for first, latents in request.given))
    return torch.tensor([place in places for place in range(frames)]).repeat_interleave(height * width)


def _release(request: Request, config: FlowConfig) -> Tensor:
    """The time until which each token is held, `(N,)`: frame k of K until k / K of the way is left, others never.

    At a clip's end frames are counted from the last one backwards.
    """
    frames, height, width = request.grid
    shift = shift_of(config, request.grid)
    release = [math.inf] * frames
    for held, places in ((request.held, range(frames)), (request.held_end, range(frames - 1, -1, -1))):
        count = 0 if held is None else held.latents_CTHW.shape[1]
        for k, place in enumerate(places[:count]):
            release[place] = shifted(k / count if held is not None and held.release else 0.0, shift)
    return torch.tensor(release).repeat_interleave(height * width)


def _ends(request: Request) -> list[tuple[int, Tensor]]:
    """Latents that a clip is held to at either end, each with the latent frame it begins at."""
    ends = [] if request.held is None else [(0, request.held.latents_CTHW)]
    if request.held_end is not None:
        latents = request.held_end.latents_CTHW
        ends.append((request.grid[0] - latents.shape[1], latents))
    return ends


def _known(request: Request, channels: int, patch: int) -> Tensor:
    frames, height, width = request.grid
    known = torch.zeros(channels, frames, height * patch, width * patch)
    for first, latents in (*request.given, *_ends(request)):
        known[:, first : first + latents.shape[1]] = latents.cpu()
    return patchify(known, patch)
