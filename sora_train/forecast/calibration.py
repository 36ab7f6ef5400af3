"""Measurement of packs with a run's model on this device, and the fit of a cost model (`Seconds`) to the times.

A measurement encodes and noises a pack, and runs forward and backward pass. It excludes the optimizer step, which costs
the same for every pack. To separate the terms of the cost model, packs contain images, or clips of several lengths and
sizes, one or several per pack.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor, nn

from sora_train.config.cost import cost, geometry
from sora_train.config.registry import METHODS
from sora_train.config.schema import Config
from sora_train.core.batch import Clip, Pack, Visit
from sora_train.core.cost import Seconds
from sora_train.methods.base import Learner, trained

_MOST_CLIPS = 16  # of a pack
_WORDS = (4, 24)  # words of a caption, alternating
TERMS = tuple(f.name for f in fields(Seconds))


@dataclass(frozen=True)
class Measured:
    """A pack and the seconds that it took."""

    tokens: tuple[int, ...]  # of its clips
    pixels: tuple[int, ...]  # of all frames of each clip
    seconds: float

    @property
    def row(self) -> list[float]:
        """Factors of the terms of `Seconds`, in the order of `TERMS`."""
        squares = sum(n * n for n in self.tokens)
        return [1.0, float(len(self.tokens)), float(sum(self.tokens)), float(squares), float(sum(self.pixels))]


@dataclass(frozen=True)
class Fit:
    """Fitted seconds by term, and leave-one-out errors: each pack is predicted by a fit to all others."""

    seconds: dict[str, float]
    errors: list[float]  # relative error of each pack
    flops_errors: list[float]  # the same for a fit of seconds proportional to FLOPs


class _Bare:
    """An engine without optimizer."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, *arguments: Any) -> Any:
        return self.module(*arguments)

    def backward(self, loss_sum: Tensor) -> None:
        loss_sum.backward()

    def step(self) -> bool:
        self.module.zero_grad()
        return True


class _Engines(dict[str, _Bare]):
    def averaged(self, *names: str) -> Any:
        return nullcontext()


def shapes(config: Config) -> list[list[tuple[int, int, int]]]:
    """Sizes (frames, height, width) of the clips of each pack that is measured."""
    grid, d = geometry(config), config.data
    stride, most = grid.temporal_stride, max(1, d.max_frames)
    frames = sorted({1 + (most - 1) * part // 4 // stride * stride for part in range(5)})
    sides = sorted({max(1, int((d.max_pixels / part) ** 0.5) // grid.multiple) * grid.multiple for part in (4, 2, 1)})
    found = []
    for size in ((f, side, side) for f in frames for side in sides):
        together = min(_MOST_CLIPS, d.max_tokens // grid.tokens(*size))
        found += [[size] * count for count in sorted({1, (together + 1) // 2, together} - {0})]
    return found


def measure(config: Config, device: torch.device, rounds: int, latents: bool) -> Iterator[Measured]:
    """Measure all packs once per round, and yield each with its median.

    Args:
        config: Configuration of the run.
        device: Device to measure on.
        rounds: Number of measurements of each pack, after a warm-up.
        latents: The clips are encoded before training, so the VAE isn't run.
    """
    with torch.device(device):
        learner = METHODS.get(config.method).planned(config)
    engines = _Engines()
    for network in learner.networks.values():
        network.module.to(device)
        if not network.trained:
            network.module.eval().requires_grad_(False)
    for name, network in trained(learner.networks):
        engines[name] = _Bare(network.module)
    packs = [pack_of(config, sizes, latents) for sizes in shapes(config)]
    times: list[list[float]] = [[] for _ in packs]
    for number in range(rounds + 1):
        for pack, taken in zip(packs, times, strict=True):
            seconds = _timed(lambda one=pack: _step(learner, engines, one), device)  # type: ignore[misc]
            taken += [seconds] if number else []
    grid = geometry(config)
    for pack, taken in zip(packs, times, strict=True):
        sizes = [clip.visit.size for clip in pack.clips]
        tokens = tuple(grid.tokens(*size) for size in sizes)
        pixels = tuple(0 if latents else frames * height * width for frames, height, width in sizes)
        yield Measured(tokens, pixels, statistics.median(taken))


def fit(config: Config, packs: Sequence[Measured]) -> Fit:
    """Fit the terms by non-negative least squares on the relative errors of the packs' seconds."""
    rows = np.array([pack.row for pack in packs])
    taken = np.array([pack.seconds for pack in packs])
    flops = np.array([[float(cost(config).training(pack.tokens))] for pack in packs])
    seconds = dict(zip(TERMS, _solved(rows, taken).tolist(), strict=True))
    return Fit(seconds, _left_out(rows, taken), _left_out(flops, taken))


def as_json(config: Config, result: Fit, device: str) -> dict[str, Any]:
    """Content of the JSON file for `data.cost`."""
    return {
        "about": "seconds of a pack in forward and backward pass, fitted by sora_train.calibrate",
        "device": device,
        "error": round(statistics.median(result.errors), 4),
        "seconds": result.seconds,
        "flops": asdict(cost(config)),
    }


def _solved(rows: np.ndarray, taken: np.ndarray) -> np.ndarray:
    scale = rows.max(0) + (rows.max(0) == 0)  # scales the columns to similar magnitude
    values, _ = nnls(rows / taken[:, None] / scale, np.ones(len(taken)))
    return np.asarray(values / scale)


def _left_out(rows: np.ndarray, taken: np.ndarray) -> list[float]:
    """Relative error of each pack's seconds in the fit of all others."""
    errors = []
    for n in range(len(taken)):
        others = np.arange(len(taken)) != n
        errors.append(float(abs(rows[n] @ _solved(rows[others], taken[others]) / taken[n] - 1.0)))
    return errors


def pack_of(config: Config, sizes: Sequence[tuple[int, int, int]], latents: bool, seed: int = 0) -> Pack:
    """Make a pack of clips of the given sizes (frames, height, width), with random pixels or random latents."""
    grid, clips = geometry(config), []
    for number, size in enumerate(sizes, seed):
        frames, height, width = size
        task = "image" if frames == 1 else "text_to_video"
        visit = Visit(number, 0, frames, 8.0 * (frames > 1), (height, width), (0, 0, height, width), task, number)
        caption = " ".join(["word"] * _WORDS[number % len(_WORDS)])
        pixels = torch.randint(0, 256, (0 if latents else frames, 3, height, width), dtype=torch.uint8)
        t, h, w = grid.grid(*size)
        encoded = torch.randn(config.vae.channels, t, h * grid.patch, w * grid.patch) if latents else None
        clips.append(Clip(visit, str(number), caption, pixels, encoded))
    return Pack(clips)


def _step(learner: Learner, engines: _Engines, pack: Pack) -> None:
    learner.step(engines, [pack])


def _timed(act: Callable[[], None], device: torch.device) -> float:
    """Measure the seconds of `act`, the device synchronised.

    With one CPU thread it is CPU time, which other processes don't affect.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    act()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - start
