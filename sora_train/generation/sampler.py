"""From prompts to video files: what training, `sample` and `evaluate` share."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from sora_train.config.cost import geometry
from sora_train.config.schema import Config
from sora_train.core.media import contact_sheet, write_mp4, write_png
from sora_train.encoding.captions import tokenizer
from sora_train.encoding.vae import FrozenVae
from sora_train.flow.ode import Request, generate


class Sampler:
    """Generates videos for requests with one network."""

    def __init__(self, config: Config, network: nn.Module, vae: FrozenVae, device: torch.device) -> None:
        self.config, self.network, self.vae, self.device = config, network, vae, device
        self.tokenize = tokenizer(config, device)

    def videos(self, requests: Sequence[Request]) -> list[np.ndarray]:
        """frames_THWC uint8 of each request, sampled together as one pack."""
        return [self._decode(x, request) for x, request in zip(self.latents(requests), requests, strict=True)]

    def latents(self, requests: Sequence[Request]) -> list[Tensor]:
        """Normalised latents `(C, T, H, W)` of each request, sampled together as one pack."""
        patch, channels = self.config.model.patch, self.config.vae.channels
        return generate(self.network, requests, self.config.flow, channels, patch, self.tokenize, self.device)

    def _decode(self, latents_CTHW: Tensor, request: Request) -> np.ndarray:
        """A clip's frames. A given end is decoded as it was encoded: after a frame of its own, not after a made one."""
        video = self.vae.decode(latents_CTHW)
        if request.lead_CTHW is not None:
            _, end = request.given[-1]
            known = self.vae.decode(torch.cat((request.lead_CTHW, end), dim=1))[1:]
            video[len(video) - len(known) :] = known
        return video

    def in_batches(self, requests: Sequence[Request]) -> list[np.ndarray]:
        """The same for any number of requests, equal sizes together, a few thousand tokens at a time."""
        grid_tokens = [int(np.prod(r.grid)) for r in requests]
        order = sorted(range(len(requests)), key=lambda i: requests[i].grid)
        videos: dict[int, np.ndarray] = {}
        batch: list[int] = []
        for place, i in enumerate(order):
            batch.append(i)
            full = sum(grid_tokens[j] for j in batch) >= 4 * self.config.data.max_tokens
            if full or place == len(order) - 1:
                videos |= zip(batch, self.videos([requests[j] for j in batch]), strict=True)
                batch = []
        return [videos[i] for i in range(len(requests))]


def request_for(config: Config, caption: str, size: tuple[int, int, int], seed: int) -> Request:
    """A request for a clip of (frames, height, width); all are rounded to the VAE's and the patch's grid."""
    return Request(caption, geometry(config).grid(*size), seed)


def save_sample(
    folder: Path, name: str, frames_THWC: np.ndarray | Iterable[np.ndarray], fps: float, about: Mapping[str, object]
) -> Path:
    """Write NAME.mp4 (NAME.png for one frame), a contact sheet NAME-sheet.png, and NAME.json; returns the video.

    Of frames that come in pieces, the sheet shows the first frames of a few of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n")
    comment = {"comment": "AI-generated video (sora_train)"}
    path = folder / f"{name}.mp4"
    if isinstance(frames_THWC, np.ndarray):
        shown = frames_THWC
        if len(frames_THWC) == 1:
            path = folder / f"{name}.png"
            write_png(path, frames_THWC[0])
        else:
            write_mp4(path, frames_THWC, fps, metadata=comment)
    else:
        firsts: list[np.ndarray] = []
        write_mp4(path, _watched(frames_THWC, firsts), fps, metadata=comment)
        shown = np.stack(firsts)
    scale = max(1, round(128 / shown.shape[1]))
    write_png(folder / f"{name}-sheet.png", contact_sheet(shown, columns=min(8, len(shown)), scale=scale))
    return path


def _watched(pieces: Iterable[np.ndarray], firsts: list[np.ndarray]) -> Iterator[np.ndarray]:
    """The pieces as they come, evenly spaced ones' first frames kept: fewer than 16."""
    every = 1
    for number, piece in enumerate(pieces):
        if number % every == 0:
            firsts.append(piece[0])
            if len(firsts) == 16:
                del firsts[1::2]
                every *= 2
        yield piece
