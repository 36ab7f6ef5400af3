"""Rectified flow over packs: x_t = (1 - t) x_0 + t noise, the network predicts the velocity noise - x_0.

Liu et al. 2022 (arXiv 2209.03003); logit-normal timesteps and their shift from Esser et al. 2024 (arXiv 2403.03206,
section 3.1 and 5.3.2). The timestep is set per latent frame: given frames stand at t = 0 and bear no loss; in a share
of the clips every other frame has a timestep of its own (diffusion forcing, Chen et al. 2024, arXiv 2407.01392).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor, nn

from sora_train.config.schema import TASKS, FlowConfig, Timesteps, Weighting
from sora_train.core.batch import Clip, Grid, LatentPack, Layout, Pack, send
from sora_train.core.cost import Geometry
from sora_train.core.seeds import DROP_CAPTION, NOISE, PER_FRAME, TIMESTEP, stream, uniform
from sora_train.flow.patches import patchify
from sora_train.flow.prediction import velocity
from sora_train.flow.tasks import given_frames

LEVELS = 10  # bins of t for the loss by noise level

Encode = Callable[[Tensor], Tensor]  # video_BCTHW uint8 to normalised latents_BCTHW
Tokenize = Callable[[Sequence[str]], tuple[Tensor, tuple[int, ...]]]


@dataclass
class Loss:
    """Summed loss of a pack, and what a dashboard wants to know of it (all on the device)."""

    sum: Tensor
    level_sum: Tensor  # (LEVELS,) summed loss by noise level
    level_weight: Tensor  # (LEVELS,) loss-bearing tokens of each level
    texts: tuple[int, ...] | None = None  # text tokens of each clip
    by_task: Tensor | None = None  # (2, tasks) summed loss and weight of each task, in the order of config.TASKS


class FlowTask:
    """What a diffusion step does: encode, noise, predict, compare. `encode` and `tokenize` belong to other parts."""

    def __init__(
        self,
        config: FlowConfig,
        geometry: Geometry,
        channels: int,
        encode: Encode,
        tokenize: Tokenize,
        cache_bytes: int = 0,
    ) -> None:
        self.config, self.geometry, self.channels = config, geometry, channels
        self.encode, self.tokenize = encode, tokenize
        self._cache: dict[tuple[object, ...], Tensor] = {}
        self._cache_room = cache_bytes

    def weight(self, pack: Pack) -> float:
        """Loss-bearing tokens (or clips) of a pack, known before anything is encoded."""
        if self.config.weighting is Weighting.clip:
            return float(len(pack.clips))
        return float(sum(_generated(clip, self.geometry) for clip in pack.clips))

    def loss(self, network: nn.Module, pack: Pack, device: torch.device) -> Loss:
        """Squared error of the predicted velocity, averaged over each patch, summed over loss-bearing tokens.

        Weighted by clip: the clips' means, summed over clips.
        """
        latents = self.prepare(pack, device)
        velocity_NP = velocity(self.config.prediction, network(latents), latents)
        error_N = (velocity_NP - latents.target_NP).square().mean(1) * latents.weight_N
        bins = (latents.level_N * LEVELS).long().clamp(0, LEVELS - 1)
        zeros = torch.zeros(LEVELS, device=error_N.device)
        return Loss(
            error_N.sum(),
            zeros.index_add(0, bins, error_N.detach()),
            zeros.index_add(0, bins, latents.weight_N),
            latents.layout.texts,
            _by_task(pack, latents, error_N.detach()),
        )

    @torch.no_grad()
    def prepare(self, pack: Pack, device: torch.device) -> LatentPack:
        """Encode the clips, and noise each with its visit's own numbers. A pack without clips gets one dead token."""
        if not pack.clips:
            return self._nothing(device)
        xs, targets, weights, levels, t_of = [], [], [], [], []
        grids: list[Grid] = []
        table: list[float] = []
        clip_of: list[int] = []
        for clip, latents_CTHW in zip(pack.clips, self._encode(pack, device), strict=True):
            seed = clip.visit.seed
            generator = torch.Generator().manual_seed(stream(seed, NOISE))
            noise = send(torch.randn(latents_CTHW.shape, generator=generator), device)
            grid = self.geometry.grid(*clip.visit.size)
            given = given_frames(clip.visit.task, grid[0], seed)
            drawn = draw_timesteps(self.config, seed, grid)
            t_T = send(torch.tensor([0.0 if g else t for g, t in zip(given, drawn, strict=True)]), device)
            x_CTHW = latents_CTHW + t_T.view(1, -1, 1, 1) * (noise - latents_CTHW)
            per_frame = grid[1] * grid[2]
            generate_T = send(torch.tensor([not g for g in given], dtype=torch.float32), device)
            distinct = [0.0, *dict.fromkeys(drawn)]
            place_T = torch.tensor([0 if g else distinct.index(t) for g, t in zip(given, drawn, strict=True)])
            xs.append(patchify(x_CTHW, self.geometry.patch))
            targets.append(patchify(noise - latents_CTHW, self.geometry.patch))
            if self.config.weighting is Weighting.clip:
                generate_T /= given.count(False) * per_frame
            weights.append(generate_T.repeat_interleave(per_frame))
            t_of.append(send(place_T + len(table), device).repeat_interleave(per_frame))
            levels.append(send(torch.tensor(drawn), device).repeat_interleave(per_frame))
            table += distinct
            clip_of += [len(grids)] * len(distinct)
            grids.append(grid)
        text, texts = self._text(pack.clips, device)
        return LatentPack(
            Layout(tuple(grids), texts),
            torch.cat(xs),
            torch.cat(targets),
            torch.cat(weights),
            send(torch.tensor(table), device),
            torch.cat(t_of),
            torch.cat(levels),
            text,
            send(torch.tensor(clip_of), device),
        )

    def _encode(self, pack: Pack, device: torch.device) -> list[Tensor]:
        """Latents of each clip; neighbours of one size go through the encoder together.

        With a cache each goes alone: what a clip is encoded beside would show in its last bits, and a resumed run,
        whose cache is cold, must see the same latents.
        """
        if self._cache_room or self._cache:
            return [self._remembered(clip, device) for clip in pack.clips]
        latents: list[Tensor] = []
        for (_, ready), run in groupby(pack.clips, key=lambda clip: (clip.visit.size, clip.latents_CTHW is not None)):
            if ready:  # encoded before
                latents += [self._ready(clip, device) for clip in run]
                continue
            videos = torch.stack([clip.video_TCHW.to(device, non_blocking=True) for clip in run])
            latents += self.encode(videos.transpose(1, 2)).unbind(0)
        return latents

    def _ready(self, clip: Clip, device: torch.device) -> Tensor:
        assert clip.latents_CTHW is not None
        return clip.latents_CTHW.to(device, non_blocking=True)

    def _remembered(self, clip: Clip, device: torch.device) -> Tensor:
        if clip.latents_CTHW is not None:
            return self._ready(clip, device)
        # by content: sample N of the validation shards is another than sample N of the training shards
        pixels = clip.video_TCHW.cpu().contiguous().numpy()
        key = (hashlib.blake2b(pixels.data, digest_size=16).digest(), pixels.shape)
        if key not in self._cache:
            video_TCHW = clip.video_TCHW.to(device, non_blocking=True)
            latents_CTHW = self.encode(video_TCHW.transpose(0, 1).unsqueeze(0))[0]
            if self._cache_room < latents_CTHW.nbytes:
                return latents_CTHW
            self._cache_room -= latents_CTHW.nbytes
            self._cache[key] = latents_CTHW
        return self._cache[key]

    def _text(self, clips: Sequence[Clip], device: torch.device) -> tuple[Tensor, tuple[int, ...]]:
        """What the network reads of all captions, end to end on the device, and the length of each."""
        if all(clip.text_LE is None for clip in clips):
            text, lengths = self.tokenize(["" if self._is_dropped(clip) else clip.caption for clip in clips])
            return send(text, device), lengths
        rows = []
        for clip in clips:
            caption = "" if self._is_dropped(clip) else clip.caption
            ready = None if clip.text_LE is None else clip.text_LE[int(self._is_dropped(clip))]
            rows.append(self.tokenize([caption])[0] if ready is None else ready)
        return torch.cat([send(row, device) for row in rows]), tuple(map(len, rows))

    def _is_dropped(self, clip: Clip) -> bool:
        return bool(uniform(clip.visit.seed, DROP_CAPTION) < self.config.caption_dropout)

    def _nothing(self, device: torch.device) -> LatentPack:
        tokens, texts = self.tokenize([""])
        text = send(tokens, device)
        blank_NP = torch.zeros(1, self.channels * self.geometry.patch**2, device=device)
        zero_N = torch.zeros(1, device=device)
        place_N = torch.zeros(1, dtype=torch.long, device=device)
        return LatentPack(
            Layout(((1, 1, 1),), texts), blank_NP, blank_NP, zero_N, zero_N, place_N, zero_N, text, place_N
        )


def shifted(t: float, shift: float) -> float:
    """A timestep moved towards noise: shift t / (1 + (shift - 1) t)."""
    return shift * t / (1.0 + (shift - 1.0) * t)


def shift_of(config: FlowConfig, grid: Grid) -> float:
    """The shift of a clip: more tokens hide less under the same noise, by the root of their number.

    Esser et al. 2024, equation 23, with the tokens of all frames in place of an image's.
    """
    if config.shift_tokens == 0:
        return config.shift
    return config.shift * math.sqrt(math.prod(grid) / config.shift_tokens)


def draw_timesteps(config: FlowConfig, seed: int, grid: Grid) -> list[float]:
    """The timestep of each latent frame of a visit, in (0, 1): one for all, or one for each."""
    shift, frames = shift_of(config, grid), grid[0]
    if float(uniform(seed, PER_FRAME)) < config.per_frame_noise:
        return [_timestep(config, float(u), shift) for u in uniform(seed, TIMESTEP, np.arange(1, frames + 1))]
    return [_timestep(config, float(uniform(seed, TIMESTEP)), shift)] * frames


def _timestep(config: FlowConfig, u: float, shift: float) -> float:
    u += 2.0**-54  # never 0
    if config.timesteps is Timesteps.logit_normal:
        u = 1.0 / (1.0 + math.exp(-NormalDist(config.mean, config.std).inv_cdf(u)))
    return shifted(u, shift)


def _by_task(pack: Pack, latents: LatentPack, error_N: Tensor) -> Tensor:
    """`(2, tasks)`: summed loss and weight of each task."""
    device = error_N.device
    if not pack.clips:
        return torch.zeros(2, len(TASKS), device=device)
    places = [
        torch.full((tokens,), TASKS.index(clip.visit.task))
        for clip, tokens in zip(pack.clips, latents.layout.lengths, strict=True)
    ]
    task_N = send(torch.cat(places), device)
    both_2N = torch.stack((error_N, latents.weight_N))
    return torch.zeros(2, len(TASKS), device=device).index_add(1, task_N, both_2N)


def _generated(clip: Clip, geometry: Geometry) -> int:
    frames, height, width = geometry.grid(*clip.visit.size)
    return given_frames(clip.visit.task, frames, clip.visit.seed).count(False) * height * width
