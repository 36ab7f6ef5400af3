"""From prompts to video files: what training, `sample` and `evaluate` share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from sora_train.config.cost import geometry, patch_features
from sora_train.config.released import is_released
from sora_train.config.schema import Config, Method, VaeConfig
from sora_train.core.cli import InputError
from sora_train.core.pixels import to_frames, to_unit
from sora_train.flow.objective import Tokenize
from sora_train.flow.ode import Request, generate
from sora_train.models.text.encoder import TextEncoder, tokenize_captions
from sora_train.models.video_model import VideoModel
from sora_train.models.video_vae.model import VideoVAE
from sora_train.models.video_vae.tiling import in_time, tiled
from sora_train.models.wan.convert import load_wan
from sora_train.models.wan.lora import add_adapters, add_to_weights, merge
from sora_train.models.wan.model import DiT
from sora_train.training.state.checkpoint import latest_intact, load_full, verify

EXPORTED = "model.safetensors"  # what `export` writes a video model's weights to


def build_video_model(config: Config) -> VideoModel:
    """The diffusion network of a configuration, freshly initialised."""
    m, t = config.model, config.text_encoder
    dit = DiT(
        patch_features(config), m.width, m.depth, m.heads, m.ffn, t.width, m.frequencies, m.rope_theta, m.gate_init,
        m.absolute_positions, m.pooled_text, m.activation_checkpointing, m.mlp_chunk, m.attention,
        rope_scaling=m.rope_scaling, rope_factors=(m.rope_factors[0], m.rope_factors[1], m.rope_factors[2]),
    )  # fmt: skip
    if m.compile:
        for block in dit.blocks:
            block.compile()
    own = TextEncoder(t.width, t.depth, t.heads, t.buckets, t.max_tokens) if t.path is None else None
    return VideoModel(dit, own)


def untrained_model(config: Config) -> VideoModel:
    """The network of a run with fresh weights and, where model.lora has a rank, adapters; for counting."""
    network = build_video_model(config)
    if config.model.lora.rank:
        add_adapters(network, network.dit, config.model.lora)
    return network


def starting_model(config: Config) -> VideoModel:
    """The network that a run begins with: fresh or from `model.init_from`, with adapters where model.lora has a rank.

    Beneath adapters and in them, what isn't read from a folder depends on the seed alone, so that it can be made anew.
    """
    if config.model.lora.rank == 0:
        return _filled(config)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        network = _filled(config)
        add_adapters(network, network.dit, config.model.lora)
    return network


def _filled(config: Config) -> VideoModel:
    network = build_video_model(config)
    if config.model.init_from is not None:
        load_wan(network.dit, config.model.init_from)
    return network


def build_vae(config: VaeConfig) -> VideoVAE:
    """The autoencoder of a configuration, freshly initialised."""
    return VideoVAE(config.channels, config.patch, config.widths, config.blocks, [(t, s) for t, s in config.strides])


def tokenizer(config: Config, device: torch.device = torch.device("cpu")) -> Tokenize:  # noqa: B008 (immutable)
    """Captions to what the network of this configuration reads: ids, or embeddings of a released encoder."""
    t = config.text_encoder
    if t.path is not None:
        from sora_train.models.text.released import ReleasedText  # transformers takes seconds to import

        return ReleasedText(t.path, device, t.max_tokens, t.pad_to)
    return lambda captions: tokenize_captions(captions, t.buckets, t.max_tokens)


def _trained_vae(config: VaeConfig) -> Any:
    """Our own trained VAE, or a released one with the same calls."""
    if config.class_name is not None:
        from sora_train.models.video_vae.released import ReleasedVae  # diffusers takes seconds to import

        return ReleasedVae(config.path or "")
    path = Path(config.path or "") / "vae.safetensors"
    if not path.is_file():
        raise InputError(f"no VAE weights at {path}; export a VAE run there")
    vae = build_vae(config)
    vae.load_state_dict(load_file(path))
    return vae


class FrozenVae:
    """A trained VAE between pixels and normalised latents."""

    def __init__(self, config: VaeConfig, device: torch.device) -> None:
        self.config, self.vae = config, _trained_vae(config)
        self.vae.to(device).eval().requires_grad_(False)
        self.device = device

    @torch.no_grad()
    def encode(self, video_BCTHW: Tensor) -> Tensor:
        """uint8 pixels to normalised latents (the posterior's mean). Large videos go in pieces and tiles (vae.tile)."""
        c, t = self.config, self.config.tile
        if not self._large(*video_BCTHW.shape[2:]):
            return self.vae.normalise(self.vae.encode(to_unit(video_BCTHW.to(self.device)))[0])
        frames = max(1, t.frames // c.temporal_stride) * c.temporal_stride

        def means(tile_BCTHW: Tensor) -> Tensor:
            pieces = (to_unit(piece.to(self.device)) for piece in in_time(tile_BCTHW, 1 + frames, frames))
            return torch.cat([mean for mean, _ in self.vae.encode_pieces(pieces)], dim=2)

        size, overlap = (self._latent_pixels(pixels) * c.spatial_stride for pixels in (t.pixels, t.overlap))
        return self.vae.normalise(tiled(means, video_BCTHW, size, overlap, 1 / c.spatial_stride))

    @torch.no_grad()
    def decode(self, latents_CTHW: Tensor) -> np.ndarray:
        """Normalised latents of one clip to frames_THWC uint8. Large videos go in pieces and tiles (vae.tile)."""
        c, t = self.config, self.config.tile
        latents = self.vae.denormalise(latents_CTHW.to(self.device).unsqueeze(0))
        frames, height, width = latents.shape[2:]
        pixels = (1 + (frames - 1) * c.temporal_stride, height * c.spatial_stride, width * c.spatial_stride)
        if not self._large(*pixels):
            return to_frames(self.vae.decode(latents)[0])
        count = max(1, t.frames // c.temporal_stride)

        def pictures(tile_BCTHW: Tensor) -> Tensor:
            pieces = self.vae.decode_pieces(in_time(tile_BCTHW, count, count))
            return torch.from_numpy(np.concatenate([to_frames(piece[0]) for piece in pieces])).permute(0, 3, 1, 2)

        size, overlap = self._latent_pixels(t.pixels), self._latent_pixels(t.overlap)
        return tiled(pictures, latents, size, overlap, c.spatial_stride).permute(0, 2, 3, 1).contiguous().numpy()

    def _large(self, frames: int, height: int, width: int) -> bool:
        return frames > self.config.tile.frames or max(height, width) > self.config.tile.pixels

    def _latent_pixels(self, pixels: int) -> int:
        return -(-pixels // self.config.spatial_stride)


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


@dataclass(frozen=True)
class Weights:
    """Which weights of a run or a folder to sample with, and in which precision."""

    checkpoint: int | None = None  # its step; None: the newest intact one
    raw: bool = False  # the trained weights themselves instead of their moving average
    bf16: bool = False
    adapters: tuple[tuple[str, float], ...] = ()  # files of adapters, each with the weight it is added with


def trained_weights(run_dir: str | Path, weights: Weights = Weights()) -> dict[str, Tensor]:  # noqa: B008 (immutable)
    """The weights of a run's checkpoint, averaged unless they are asked for raw, by parameter name."""
    return load_full(checkpoint_of(run_dir, weights.checkpoint), "master" if weights.raw else "ema")


def checkpoint_of(run_dir: str | Path, step: int | None) -> Path:
    """A run's newest intact checkpoint, or that of a step. Raises InputError where it isn't there or isn't whole."""
    folder = Path(run_dir) / "checkpoints"
    if step is None:
        return latest_intact(folder)
    path = folder / f"step-{step:08d}"
    if not path.is_dir():
        there = ", ".join(str(int(p.name.removeprefix("step-"))) for p in sorted(folder.glob("step-*"))) or "none"
        raise InputError(f"{run_dir} has no checkpoint={step}; it has {there}")
    if fault := verify(path):
        raise InputError(f"checkpoint={step} of {run_dir} is damaged ({fault}); choose another step")
    return path


def whole_weights(config: Config, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of `build_video_model` from what a run trained: adapters are added to the weights beneath them."""
    if config.model.lora.rank == 0:
        return weights
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        return merge(_filled(config).state_dict(), weights, config.model.lora)


def load_sampler(
    config: Config,
    run_dir: str | Path,
    device: torch.device,
    weights: Weights = Weights(),  # noqa: B008 (immutable)
) -> Sampler:
    """A sampler of a run, of an export, or of a released pipeline's folder.

    Raises InputError for a run that isn't a video model's, and for weights that aren't there.
    """
    if config.method is not Method.diffusion:
        raise InputError(
            f"{run_dir} holds a {config.method.value} run; samples come from a video model (experiment=demo)"
        )
    network = build_video_model(config)
    exported = Path(run_dir) / EXPORTED
    if is_released(run_dir):
        load_wan(network.dit, run_dir)
    elif exported.is_file():
        _load_exported(network, exported)
    else:
        network.load_state_dict(whole_weights(config, trained_weights(run_dir, weights)))
    for path, factor in weights.adapters:
        add_to_weights(network.dit, path, factor)
    network.to(device, torch.bfloat16 if weights.bf16 else torch.float32).eval().requires_grad_(False)
    return Sampler(config, network, FrozenVae(config.vae, device), device)


def _load_exported(network: nn.Module, path: Path) -> None:
    try:
        network.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError) as error:
        raise InputError(f"{path} doesn't hold this model: {' '.join(str(error).split())[:200]}") from error


def request_for(config: Config, caption: str, size: tuple[int, int, int], seed: int) -> Request:
    """A request for a clip of (frames, height, width); all are rounded to the VAE's and the patch's grid."""
    return Request(caption, geometry(config).grid(*size), seed)
