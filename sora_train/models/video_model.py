"""The network of a diffusion run: text encoder and transformer as one module, so that one engine holds both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sora_train.config.cost import shapes
from sora_train.config.registry import FAMILIES
from sora_train.config.schema import Config
from sora_train.core.batch import LatentPack
from sora_train.models.base import Family
from sora_train.models.layers import ulysses
from sora_train.models.text.encoder import TextEncoder
from sora_train.models.wan.lora import add_adapters, add_outlines, merge


class VideoModel(nn.Module):
    """Captions and noised patches to velocities. Without a text encoder the pack brings embeddings, not ids."""

    def __init__(self, dit: nn.Module, text: TextEncoder | None, family: Family) -> None:
        super().__init__()
        self.dit, self.text, self.family = dit, text, family

    def forward(self, pack: LatentPack) -> Tensor:
        """Velocity `(N, P)` of every token of the pack's video."""
        dtype, video = next(self.dit.parameters()).dtype, pack.video
        text_LE = pack.text.to(dtype) if self.text is None else self.text(pack.text, video.layout.texts)
        return self.dit(video.x_NP.to(dtype), text_LE, video.t_M, video.t_of_N, video.layout, video.clip_of_M)

    def blocks(self) -> Sequence[nn.Module]:
        """The transformer's blocks: the unit of compile, recomputation and ZeRO-3."""
        return self.family.blocks(self.dit)

    def matrices(self) -> Sequence[nn.Module]:
        """The modules whose linear layers are inner ones: the blocks of the transformer, and of our text encoder."""
        return [*self.blocks(), *(self.text.layers if self.text is not None else ())]

    def split_sequence(self, others: ulysses.Neighbours) -> None:
        """Share the tokens of every pack with other ranks (sequence parallelism)."""
        ulysses.apply(self, [block.self_attention for block in self.blocks()], others)


def build_video_model(config: Config) -> VideoModel:
    """The network of a configuration without adapters, freshly initialised."""
    family, t = FAMILIES.get(config.model.family), config.text_encoder
    dit = family.build(config.model, shapes(config))
    if config.model.compile:
        for block in family.blocks(dit):
            block.compile()
    own = TextEncoder(t.width, t.depth, t.heads, t.buckets) if t.path is None else None
    return VideoModel(dit, own, family)


def starting_model(config: Config) -> VideoModel:
    """The network that a run begins with: fresh or with released weights, and adapters where model.lora has a rank.

    Beneath adapters and in them, what isn't read from a folder depends on the seed alone, so that it can be made anew.
    """
    if config.model.lora.rank == 0:
        return _with_released_weights(config)
    with _seeded(config.seed):
        network = _with_released_weights(config)
        add_adapters(network, network.dit, config.model.lora)
    return network


def planned_model(config: Config) -> VideoModel:
    """The network for forecasts, whose tensors may have no memory: no weights are read, adapters are outlines."""
    network = build_video_model(config)
    if config.model.lora.rank:
        add_outlines(network, network.dit, config.model.lora)
    return network


def whole_weights(config: Config, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of `build_video_model` from what a run trained: adapters are added to the weights beneath them."""
    if config.model.lora.rank == 0:
        return weights
    with _seeded(config.seed):
        return merge(_with_released_weights(config).state_dict(), weights, config.model.lora)


def transformer_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of the transformer, by the names that its family knows."""
    return {name.removeprefix("dit."): values for name, values in weights.items() if name.startswith("dit.")}


def _with_released_weights(config: Config) -> VideoModel:
    network = build_video_model(config)
    if config.model.init_from is not None:
        network.family.load(network.dit, config.model.init_from)
    return network


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
