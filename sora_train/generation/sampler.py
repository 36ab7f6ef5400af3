"""From prompts to video files: what training, `sample` and `evaluate` share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from sora_train.config.cost import geometry
from sora_train.config.schema import Config
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
        return generate(self.network, requests, self.config.flow, channels, patch, self.tokenize, device=self.device)

    def _decode(self, latents_CTHW: Tensor, request: Request) -> np.ndarray:
        """Decode a clip. A given end is decoded as it was encoded: after its own lead frame, not a generated one."""
        video = self.vae.decode(latents_CTHW)
        if request.lead_CTHW is not None:
            _, end = request.given[-1]
            known = self.vae.decode(torch.cat((request.lead_CTHW, end), dim=1))[1:]
            video[len(video) - len(known) :] = known
        return video

    def in_batches(self, requests: Sequence[Request]) -> list[np.ndarray]:
        """Like `videos`, for any number of requests: sorted by size, about 4 x `data.max_tokens` tokens in a pack."""
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
    """Build a request for a clip. `size` is (frames, height, width), rounded to the grid of VAE and patches."""
    return Request(caption, geometry(config).grid(*size), seed)
