"""Sampling: integrate the flow's ODE from t = 1 (noise) to t = 0 with classifier-free guidance (Ho and Salimans 2022).

Any latent frames may be given as conditions. A clip may start from a partly noised clip instead of noise (SDEdit, Meng
et al. 2022, arXiv 2108.01073). Each shot of a clip may have a caption of its own. For videos longer than a clip, the
first (or last) frames may be held to the clip beside it: they follow its latents during the first part of the
denoising, and are released one after the other. Guidance extrapolates away from the empty caption, or from a negative
prompt in its place.
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
    """Overlap of a clip with the adjacent one: latents `(C, T, H, W)`, and the noise they were generated from."""

    latents_CTHW: Tensor
    noise_CTHW: Tensor
    release: bool = True  # False: all of them are held to the end
    skipped: int = 0  # latent frames between the overlap and the clip's beginning (or end)

    @property
    def places(self) -> range:
        """Latent frames that are held, counted from the clip's beginning (or end)."""
        return range(self.skipped, self.skipped + self.latents_CTHW.shape[1])


@dataclass(frozen=True)
class Request:
    """One clip to generate.

    Attributes:
        caption: Caption of the whole clip.
        grid: Token grid (time, height, width).
        seed: Seed of the noise.
        given: Conditioning latents `(C, T, H, W)`, kept unchanged, each with the latent frame at which it begins.
        start_CTHW: Latents of a whole clip to vary: it is noised to t = `strength` and denoised from there.
        strength: Timestep at which the denoising starts; 1 is noise alone.
        shots: `(latent frames, caption)` of each shot, which replaces `caption`. The frames must add up to the clip.
        lead_CTHW: Latent frame before a given end, which the causal VAE needs to decode that end. Not sampled.
        held: Overlap that the clip's frames from `held.skipped` on follow during denoising: the first of them until the
            last step, each later one for a shorter part. Unlike given frames they have the noise level of all others,
            so the model needs no training for them.
        held_end: The same at the end, mirrored: the last frame is held until the last step.
        negative: Prompt that guidance extrapolates away from; "" is the empty caption.
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
    *,
    device: torch.device,
) -> list[Tensor]:
    """Generate a batch of clips. The result of a request doesn't depend on the others of the batch.

    Args:
        network: Maps a `LatentPack` to an output `(N, P)`, see `flow/prediction.py`.
        requests: The clips to generate.
        config: Solver, steps, shift and guidance.
        channels: Latent channels.
        patch: Side of a patch in latent pixels.
        tokenize: Maps captions to text rows.
        device: Device of the network.

    Returns:
        Normalised latents `(C, T, H, W)` of each request.

    Raises:
        ValueError: Latents of a request don't match its grid, or its shots don't add up to its frames.
    """
    for request in requests:
        _check(request, channels, patch)
    sizes = [math.prod(request.grid) for request in requests]
    clip_of_N = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes), output_size=sum(sizes)).to(device)
    x_NP = torch.cat([_start(request, channels, patch) for request in requests]).to(device)
    given_N1 = torch.cat([_given_mask(request) for request in requests]).unsqueeze(1).to(device)
    known_NP = torch.cat([_known(request, channels, patch) for request in requests]).to(device)
    release_N1 = torch.cat([_release(request, config) for request in requests]).unsqueeze(1).to(device)
    guided = _Guided(network, requests, tokenize, given_N1.squeeze(1), config, device)
    times = [torch.tensor(row, device=device)[clip_of_N].unsqueeze(1) for row in _times(requests, config)]

    def field(x_NP: Tensor, t_N1: Tensor) -> Tensor:
        back_NP = (x_NP - known_NP) / t_N1  # velocity that leads straight to the held latents at t = 0
        free_NP = guided.velocity(x_NP, t_N1.squeeze(1))
        return torch.where(t_N1 > release_N1, back_NP, free_NP).masked_fill(given_N1, 0.0)

    x_NP = torch.where(given_N1, known_NP, x_NP)
    x_NP = SOLVE[config.solver](field, x_NP, times)
    return [unpatchify(x, r.grid, patch) for x, r in zip(x_NP.split(sizes), requests, strict=True)]


def _times(requests: Sequence[Request], config: FlowConfig) -> list[list[float]]:
    """Timesteps by step and request: from the request's strength to 0, evenly spaced before the shift."""
    shifts, steps = [shift_of(config, request.grid) for request in requests], config.sampling_steps
    firsts = [shifted(r.strength, 1.0 / shift) for r, shift in zip(requests, shifts, strict=True)]  # before the shift
    return [
        [shifted(first * (1.0 - k / steps), shift) for first, shift in zip(firsts, shifts, strict=True)]
        for k in range(steps + 1)
    ]


class _Guided:
    """Guided velocity field of a batch of requests; conditional and unconditional clips run in one pack."""

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
            spans = torch.tensor(layout.spans)
            caption_of_N = torch.arange(len(texts)).repeat_interleave(spans, output_size=sum(layout.spans))
            self.packs.append((layout, text.to(device), caption_of_N.to(device)))

    def velocity(self, x_NP: Tensor, t_N: Tensor) -> Tensor:
        """Guided velocity of every token at its clip's timestep, `(N, P)` fp32."""
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
        """Guided velocity of one clip, rescaled towards the standard deviation of the conditional one.

        Lin et al. 2023 (arXiv 2305.08891, section 3.4): guidance alone makes pictures overexposed.
        """
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
        t_M = torch.stack((torch.zeros_like(t_S), t_S), dim=1).flatten()  # two per caption: of given frames, of others
        place_N = 2 * caption_of_N + (~self.given_N).long().repeat(copies)
        caption_of_M = torch.arange(captions, device=x.device).repeat_interleave(2)
        video = Stream(layout, x, unused, unused, t_M, place_N, unused, caption_of_M)
        return velocity(self.config.prediction, self.network(LatentPack({"video": video}, text)), video)


def _check(request: Request, channels: int, patch: int) -> None:
    """Raise ValueError if latents don't match the grid, or shots don't add up to its frames."""
    frames, height, width = request.grid
    shape = (channels, height * patch, width * patch)
    start = [] if request.start_CTHW is None else [(0, request.start_CTHW)]
    held = [(first, latents) for first, latents, _ in _held(request)]
    for first, latents in (*request.given, *held, *start):
        if (*latents.shape[:1], *latents.shape[2:]) != shape or not 0 <= first <= frames - latents.shape[1]:
            raise ValueError(f"latents {tuple(latents.shape)} at frame {first} don't fit {request.grid} of {shape}")
    if request.shots and sum(length for length, _ in request.shots) != frames:
        raise ValueError(f"shots of {[length for length, _ in request.shots]} latent frames don't fill {frames}")


def noise_of(request: Request, channels: int, patch: int) -> Tensor:
    """Initial noise `(C, T, H, W)` of a request, with the noise of its held frames where it has any."""
    frames, height, width = request.grid
    generator = torch.Generator().manual_seed(request.seed)
    noise_CTHW = torch.randn(channels, frames, height * patch, width * patch, generator=generator)
    for first, _, held_CTHW in _held(request):
        noise_CTHW[:, first : first + held_CTHW.shape[1]] = held_CTHW
    return noise_CTHW


def _start(request: Request, channels: int, patch: int) -> Tensor:
    """Initial tokens `(N, P)`: noise, or `start_CTHW` noised to t = `strength`."""
    noise = patchify(noise_of(request, channels, patch), patch)
    if request.start_CTHW is None:
        return noise
    return torch.lerp(patchify(request.start_CTHW.cpu().float(), patch), noise, request.strength)


def _given_mask(request: Request) -> Tensor:
    frames, height, width = request.grid
    places = set(chain.from_iterable(range(first, first + latents.shape[1]) for first, latents in request.given))
    return torch.tensor([place in places for place in range(frames)]).repeat_interleave(height * width)


def _release(request: Request, config: FlowConfig) -> Tensor:
    """Timestep above which each token is held, `(N,)`: k / K (shifted) for frame k of K held ones, else infinity.

    At a clip's end frames are counted from the last one backwards.
    """
    frames, height, width = request.grid
    shift = shift_of(config, request.grid)
    release = [math.inf] * frames
    for held, order in ((request.held, range(frames)), (request.held_end, range(frames - 1, -1, -1))):
        if held is not None:
            for k, place in enumerate(held.places):
                release[order[place]] = shifted(k / len(held.places) if held.release else 0.0, shift)
    return torch.tensor(release).repeat_interleave(height * width)


def _held(request: Request) -> list[tuple[int, Tensor, Tensor]]:
    """List the held overlaps of a clip: first latent frame, latents `(C, T, H, W)`, noise `(C, T, H, W)`."""
    ends = []
    if (held := request.held) is not None:
        ends.append((held.places.start, held.latents_CTHW, held.noise_CTHW))
    if (held := request.held_end) is not None:
        ends.append((request.grid[0] - held.places.stop, held.latents_CTHW, held.noise_CTHW))
    return ends


def _known(request: Request, channels: int, patch: int) -> Tensor:
    frames, height, width = request.grid
    known = torch.zeros(channels, frames, height * patch, width * patch)
    for first, latents in (*request.given, *((first, latents) for first, latents, _ in _held(request))):
        known[:, first : first + latents.shape[1]] = latents.cpu()
    return patchify(known, patch)
