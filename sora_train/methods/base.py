"""The methods a run can train by: each brings a network, what the optimizer moves, a task, and previews for people.

To add one: a class with these four, a name in `config.Method`, a line in `METHODS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import nn

from sora_train.config.cost import geometry
from sora_train.config.schema import Config, Method, Precision
from sora_train.core.batch import Clip
from sora_train.core.pixels import to_frames, to_unit
from sora_train.core.world import World
from sora_train.flow.objective import FlowTask
from sora_train.generation.output import save_sample
from sora_train.generation.sampler import (
    FrozenVae,
    Sampler,
    build_vae,
    build_video_model,
    request_for,
    starting_model,
    tokenizer,
)
from sora_train.methods.reconstruction import AutoencodingTask
from sora_train.models.video_vae.perceptual import Perceptual
from sora_train.models.wan.lora import add_outlines
from sora_train.training.parts import Task


class MethodParts(Protocol):
    """What a run needs of its method."""

    network: nn.Module
    groups: list[tuple[nn.Module, float]]  # what is trained, with a factor on the learning rate
    task: Task

    def preview(self, live: nn.Module, clip: Clip) -> np.ndarray:
        """Show what the network makes of a clip, frames_THWC uint8; `live` runs it (under ZeRO)."""


class Diffusion:
    """Rectified flow on the latents of a frozen VAE; a preview is a sample of the clip's caption."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self.config, self.device = config, device
        self.vae = FrozenVae(config.vae, device)
        network = starting_model(config)
        self.network: nn.Module = network
        self.groups: list[tuple[nn.Module, float]] = [(network.dit, 1.0)]
        if network.text is not None:
            self.groups.append((network.text, config.optim.text_lr_scale))
        cache_bytes = config.vae.cache_mib << 20
        self.task: Task = FlowTask(
            config.flow, geometry(config), config.vae.channels, self.vae.encode, tokenizer(config, device), cache_bytes
        )

    def preview(self, live: nn.Module, clip: Clip) -> np.ndarray:
        """A sample of the clip's caption in the clip's size."""
        request = request_for(self.config, clip.caption, clip.visit.size, clip.visit.seed >> 1)
        return Sampler(self.config, live, self.vae, self.device).videos([request])[0]


class Autoencoding:
    """The video VAE; a preview shows the clip beside its reconstruction."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self.device = device
        self.network: nn.Module = build_vae(config.vae)
        self.groups: list[tuple[nn.Module, float]] = [(self.network, 1.0)]
        wanted = config.vae.perceptual
        perceptual = Perceptual().load(wanted.files).to(device) if wanted.weight else None
        self.task: Task = AutoencodingTask(config.vae, geometry(config), perceptual)

    def preview(self, live: nn.Module, clip: Clip) -> np.ndarray:
        """Left the clip, right what comes out of the autoencoder."""
        video = to_unit(clip.video_TCHW.transpose(0, 1).to(self.device))
        (decoded, _, _), *_ = live([video.unsqueeze(0)], [torch.zeros((), device=self.device)])
        return np.concatenate((to_frames(video), to_frames(decoded[0])), axis=2)


METHODS: dict[Method, Callable[[Config, torch.device], MethodParts]] = {
    Method.diffusion: Diffusion,
    Method.autoencoder: Autoencoding,
}


def write_previews(
    method: MethodParts,
    live: nn.Module,
    clips: Sequence[Clip],
    folder: Path,
    fps: float,
    world: World,
    break_off: Callable[[], bool],
) -> dict[str, Path]:
    """Write a preview of every clip, the work shared out over the data-parallel groups; returns the videos by caption.

    Every rank runs the network equally often, because a partitioned network needs all of them. `break_off` is asked
    before each preview, by all ranks together; then the rest is left, and no video returned.
    """
    paths = {}
    for number in range(-(-len(clips) // world.data_size)):
        if break_off():
            return {}
        place = number * world.data_size + world.data_rank
        clip = clips[min(place, len(clips) - 1)]
        with torch.no_grad():
            frames = method.preview(live, clip)
        if place < len(clips) and world.sequence_rank == 0:
            about = {"prompt": clip.caption, "seed": clip.visit.seed >> 1, "clip": clip.key}
            save_sample(folder, f"{place:02d}", frames, clip.visit.fps or fps, about)
    for place, clip in enumerate(clips):
        if clip.visit.frames > 1:
            paths[clip.caption] = folder / f"{place:02d}.mp4"
    return paths


def untrained(config: Config) -> tuple[nn.Module, Task, nn.Module]:
    """Network in the run's precision, task, and frozen VAE of a run, with fresh weights and without a trained VAE.

    For planning, also on tensors without memory, which can't be cast in place: so all is built in its precision, and
    adapters, which peft can't make there, are outlines of peft's.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if config.precision is Precision.bf16 else torch.float32)
    try:
        network: nn.Module = build_video_model(config) if config.method is Method.diffusion else build_vae(config.vae)
        if config.method is Method.diffusion and config.model.lora.rank:
            add_outlines(network, network.get_submodule("dit"), config.model.lora)
    finally:
        torch.set_default_dtype(before)
    if config.method is Method.autoencoder:
        seeing = Perceptual() if config.vae.perceptual.weight else None
        return network, AutoencodingTask(config.vae, geometry(config), seeing), seeing or nn.Module()
    vae = build_vae(config.vae).requires_grad_(False)

    @torch.no_grad()
    def encode(video_BCTHW: torch.Tensor) -> torch.Tensor:
        return vae.normalise(vae.encode(to_unit(video_BCTHW))[0])

    task = FlowTask(config.flow, geometry(config), config.vae.channels, encode, tokenizer(config))
    return network, task, vae
