"""The network of a diffusion run: text encoder and transformer as one module, trained by one DeepSpeed engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

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
    """Transformer, and the text encoder that is trained with it.

    With `text` None the encoder is a frozen one outside of this module, and packs hold embeddings instead of word ids.
    """

    def __init__(self, dit: nn.Module, text: TextEncoder | None, family: Family) -> None:
        super().__init__()
        self.dit, self.text, self.family = dit, text, family

    def forward(self, pack: LatentPack) -> Tensor:
        """Output `(N, P)` for every token of the video stream: the velocity, or as `flow.prediction` says."""
        dtype, video = next(self.dit.parameters()).dtype, pack.video
        text_LE = pack.text.to(dtype) if self.text is None else self.text(pack.text, video.layout.texts)
        return self.dit(video.x_NP.to(dtype), text_LE, video.t_M, video.t_of_N, video.layout, video.clip_of_M)

    def blocks(self) -> Sequence[nn.Module]:
        """Blocks of the transformer; see `Family.blocks`."""
        return self.family.blocks(self.dit)

    def matrices(self) -> Sequence[nn.Module]:
        """Modules whose linear layers Muon may update: the blocks of the transformer and of our own text encoder."""
        return [*self.blocks(), *(self.text.layers if self.text is not None else ())]

    def split_sequence(self, groups: ulysses.Groups) -> None:
        """Divide the tokens of every pack among the ranks that share it."""
        ulysses.apply(self, [block.self_attention for block in self.blocks()], groups)


def build_video_model(config: Config) -> VideoModel:
    """Build the network of a configuration without adapters, randomly initialised."""
    family, t = FAMILIES.get(config.model.family), config.text_encoder
    dit = family.build(config.model, shapes(config))
    if config.model.compile:
        for block in family.blocks(dit):
            block.compile()
    own = TextEncoder(t.width, t.depth, t.heads, t.buckets) if t.path is None else None
    return VideoModel(dit, own, family)


def starting_model(config: Config) -> VideoModel:
    """Build the network with its initial weights: random or released ones, and adapters with `model.lora`.

    With adapters, all random initial values depend on the configured seed alone, because checkpoints contain only the
    adapters, and `whole_weights` rebuilds the frozen weights from the seed.
    """
    if config.model.lora.rank == 0:
        return _with_released_weights(config)
    with _seeded(config.seed):
        network = _with_released_weights(config)
        add_adapters(network, network.dit, config.model.lora)
        if config.model.lora.init_from is not None:
            network.family.start_adapters(network.dit, config.model.lora.init_from, config.model)
    return network


def planned_model(config: Config) -> VideoModel:
    """Build the network for a forecast, where tensors may be fake: reads no weights, and doesn't need peft."""
    network = build_video_model(config)
    if config.model.lora.rank:
        add_outlines(network, network.dit, config.model.lora)
    return network


def whole_weights(config: Config, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Turn a run's trained weights into those of `build_video_model`; adapters are merged into the frozen weights."""
    if config.model.lora.rank == 0:
        return weights
    with _seeded(config.seed):
        return merge(_with_released_weights(config).state_dict(), weights, config.model.lora)


def base_shapes(config: Config) -> dict[str, tuple[int, ...]] | None:
    """Shapes of the parameters of the network with `optim.base_width` in place of `model.width`; None if that is 0."""
    base, model = config.optim.base_width, config.model
    if not base:
        return None
    heads = max(1, model.heads * base // model.width)
    narrow = replace(model, width=base, heads=heads, ffn=model.ffn * base // model.width)
    with torch.device("meta"):
        network = build_video_model(replace(config, model=narrow))
    return {name: tuple(p.shape) for name, p in network.named_parameters()}


def transformer_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Select the weights of the transformer, under the names that its family uses."""
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
