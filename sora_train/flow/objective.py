"""Rectified flow over packs: x_t = (1 - t) x_0 + t noise, and the network predicts the velocity noise - x_0.

Liu et al. 2022 (arXiv 2209.03003); logit-normal timesteps and their shift from Esser et al. 2024 (arXiv 2403.03206,
sections 3.1 and 5.3.2). Every latent frame has a timestep: given (conditioning) frames have t = 0 and no loss. The
other frames of a clip share one timestep, or, in a share `per_frame_noise` of the clips, have one each (diffusion
forcing, Chen et al. 2024, arXiv 2407.01392).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

from sora_train.config.schema import TASKS, FlowConfig, Timesteps, Weighting
from sora_train.core.batch import Clip, Grid, LatentPack, Layout, Pack, Stream, send
from sora_train.core.cost import Geometry
from sora_train.core.loss import LEVELS, Loss
from sora_train.core.seeds import DROP_CAPTION, NOISE, PER_FRAME, TIMESTEP, stream, uniform
from sora_train.flow.patches import patchify
from sora_train.flow.prediction import velocity
from sora_train.flow.tasks import given_frames

TextRows = tuple[Tensor, tuple[int, ...]]  # rows of all captions end to end, and the length of each


class FlowObjective:
    """The training objective: noises the latents of a pack, and computes the loss of the network's output.

    Everything random (timesteps, noise, caption dropout) is drawn from the seed of each visit.
    """

    def __init__(self, config: FlowConfig, geometry: Geometry, channels: int) -> None:
        self.config, self.geometry, self.channels = config, geometry, channels

    def weight(self, pack: Pack) -> float:
        """Number of loss-bearing tokens (or clips, see `flow.weighting`) of a pack, computed without encoding it."""
        if self.config.weighting is Weighting.clip:
            return float(len(pack.clips))
        return float(sum(_generated(clip, self.geometry) for clip in pack.clips))

    def is_dropped(self, clip: Clip) -> bool:
        """True if this visit gets the empty caption, to train the unconditional prediction of guidance."""
        return float(uniform(clip.visit.seed, DROP_CAPTION)) < self.config.caption_dropout

    def noised(
        self, clips: Sequence[Clip], latents: Sequence[Tensor], text: TextRows, device: torch.device
    ) -> LatentPack:
        """Noise the latents of a pack, and compute targets and loss weights.

        Args:
            clips: The clips of the pack. Without clips the result is a single token of zeros that bears no loss, so
                that the rank takes part in all collectives of the step.
            latents: Normalised latents `(C, T, H, W)` of each clip.
            text: Text rows of all captions end to end, and the length of each.
            device: Device of the result.
        """
        if not clips:
            return self._blank(text, device)
        xs, targets, weights, levels, t_of = [], [], [], [], []
        grids: list[Grid] = []
        table: list[float] = []
        clip_of: list[int] = []
        for clip, latents_CTHW in zip(clips, latents, strict=True):
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
        video = Stream(
            Layout(tuple(grids), text[1]),
            torch.cat(xs),
            torch.cat(targets),
            torch.cat(weights),
            send(torch.tensor(table), device),
            torch.cat(t_of),
            torch.cat(levels),
            send(torch.tensor(clip_of), device),
        )
        return LatentPack({"video": video}, text[0])

    def _blank(self, text: TextRows, device: torch.device) -> LatentPack:
        blank_NP = torch.zeros(1, self.channels * self.geometry.patch**2, device=device)
        zero_N = torch.zeros(1, device=device)
        place_N = torch.zeros(1, dtype=torch.long, device=device)
        layout = Layout(((1, 1, 1),), text[1])
        video = Stream(layout, blank_NP, blank_NP, zero_N, zero_N, place_N, zero_N, place_N)
        return LatentPack({"video": video}, text[0])

    def loss(self, output_NP: Tensor, pack: Pack, latents: LatentPack) -> Loss:
        """Squared error of the predicted velocity: mean over the values of a patch, sum over loss-bearing tokens.

        With `flow.weighting=clip`: mean over each clip's tokens, sum over clips.

        Args:
            output_NP: Output of the network for the video stream.
            pack: The clips, whose tasks the loss is also reported by.
            latents: Result of `noised` for the pack.
        """
        video = latents.video
        velocity_NP = velocity(self.config.prediction, output_NP, video)
        error_N = (velocity_NP - video.target_NP).square().mean(1) * video.weight_N
        bins = (video.level_N * LEVELS).long().clamp(0, LEVELS - 1)
        zeros = torch.zeros(LEVELS, device=error_N.device)
        return Loss(
            error_N.sum(),
            zeros.index_add(0, bins, error_N.detach()),
            zeros.index_add(0, bins, video.weight_N),
            video.layout.texts,
            _by_task(pack, video, error_N.detach()),
        )


def shifted(t: float, shift: float) -> float:
    """Shift a timestep towards noise: shift t / (1 + (shift - 1) t)."""
    return shift * t / (1.0 + (shift - 1.0) * t)


def shift_of(config: FlowConfig, grid: Grid) -> float:
    """Timestep shift of a clip. With `shift_tokens`, it grows with the square root of the number of tokens.

    The same noise hides less of a larger clip (Esser et al. 2024, equation 23, applied to the tokens of all frames).
    """
    if config.shift_tokens == 0:
        return config.shift
    return config.shift * math.sqrt(math.prod(grid) / config.shift_tokens)


def draw_timesteps(config: FlowConfig, seed: int, grid: Grid) -> list[float]:
    """Draw the timestep of each latent frame of a visit, in (0, 1): the same for all frames, or one for each."""
    shift, frames = shift_of(config, grid), grid[0]
    if float(uniform(seed, PER_FRAME)) < config.per_frame_noise:
        return [_timestep(config, float(u), shift) for u in uniform(seed, TIMESTEP, np.arange(1, frames + 1))]
    return [_timestep(config, float(uniform(seed, TIMESTEP)), shift)] * frames


def _timestep(config: FlowConfig, u: float, shift: float) -> float:
    u += 2.0**-54  # u may be 0, where the inverse CDF is infinite
    if config.timesteps is Timesteps.logit_normal:
        u = 1.0 / (1.0 + math.exp(-NormalDist(config.mean, config.std).inv_cdf(u)))
    return shifted(u, shift)


def _by_task(pack: Pack, video: Stream, error_N: Tensor) -> Tensor:
    """Summed loss and summed weight by task, `(2, tasks)`."""
    device = error_N.device
    if not pack.clips:
        return torch.zeros(2, len(TASKS), device=device)
    places = [
        torch.full((tokens,), TASKS.index(clip.visit.task))
        for clip, tokens in zip(pack.clips, video.layout.lengths, strict=True)
    ]
    task_N = send(torch.cat(places), device)
    both_2N = torch.stack((error_N, video.weight_N))
    return torch.zeros(2, len(TASKS), device=device).index_add(1, task_N, both_2N)


def _generated(clip: Clip, geometry: Geometry) -> int:
    frames, height, width = geometry.grid(*clip.visit.size)
    return given_frames(clip.visit.task, frames, clip.visit.seed).count(False) * height * width
