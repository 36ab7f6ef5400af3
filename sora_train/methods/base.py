"""The contract of a training method: the networks that a run trains, and one optimizer step of all of them.

A method has two parts. A `Method` derives properties of a configuration (geometry, cost, rules) and imports no torch,
so that mistakes are reported at once. The `Learner` that it builds owns the networks and performs the steps. Methods
are registered by name in `config/registry.py`; a plugin calls `METHODS.register(NAME, method)`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from sora_train.config.schema import Precision

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor, nn

    from sora_train.config.schema import Config
    from sora_train.core.batch import Clip, Pack
    from sora_train.core.cost import AdapterCost, Cost, Geometry
    from sora_train.core.loss import Loss


@dataclass
class Network:
    """A network of a method.

    Attributes:
        module: The network.
        rates: The submodules that are optimised, each with a factor on the learning rate. None: the network is frozen.
        ema: Keep an exponential moving average of the weights.
        passes: Backward passes through the network per pack.
        matrices: The modules in which Muon may update the weights of linear layers and convolutions: blocks, never
            embeddings, modulation or the output projection of a transformer. None for adapters, which AdamW updates
            regardless of `optim.matrices`.
        base_shapes: Shapes of the parameters if the network had the width `optim.base_width`, by name. Learning rates
            of matrices are scaled by the ratio (muP). None: they are not scaled.
    """

    module: nn.Module
    rates: list[tuple[nn.Module, float]] | None
    ema: bool = True
    passes: int = 1
    matrices: Sequence[nn.Module] | None = ()
    base_shapes: Mapping[str, tuple[int, ...]] | None = None

    @property
    def trained(self) -> bool:
        """True unless the network is frozen."""
        return self.rates is not None


@dataclass
class StepResult:
    """Result of an optimizer step: the loss of each pack, and `applied`, True if every engine updated its weights."""

    applied: bool = False
    losses: list[tuple[Pack, Loss]] = field(default_factory=list)


class Engine(Protocol):
    """Interface of a trained network under ZeRO."""

    def __call__(self, *arguments: Any) -> Any:
        """Run the network forward."""

    def backward(self, loss_sum: Tensor) -> None:
        """Back-propagate a pack's summed loss, divided by the loss weight of the whole step over all ranks."""

    def step(self) -> bool:
        """Update the weights after the last backward pass. False if it was skipped because of a non-finite value."""


class Engines(Protocol):
    """The engines of a method's trained networks, by name."""

    def __getitem__(self, name: str) -> Engine:
        """The engine of the network of this name."""

    def averaged(self, *names: str) -> AbstractContextManager[None]:
        """Context in which these networks run with their averaged (EMA) weights. Collective; any ZeRO stage."""


class Learner(Protocol):
    """The networks of a run, and its training, validation and preview steps."""

    networks: dict[str, Network]  # by name, frozen ones too; the first trained one is the run's main network

    def weight(self, pack: Pack) -> float:
        """Loss weight of a pack, e.g. its loss-bearing tokens. A step's loss is divided by the sum over its packs."""

    def step(self, engines: Engines, packs: Sequence[Pack]) -> StepResult:
        """Perform one optimizer step: all backward passes, and `step` of every engine."""

    def validate(self, engines: Engines, pack: Pack) -> Tensor:
        """Summed loss of a held-out pack. Its noise depends on its clips alone, so that validations are comparable."""

    def preview(self, engines: Engines, clip: Clip) -> np.ndarray:
        """Frames `(T, H, W, 3)` uint8 that show the networks' output for a clip, for the logs."""


class Method(Protocol):
    """Properties and rules of a method for a configuration, available before any network is built."""

    fixed: tuple[str, ...]  # configuration sections and keys that may not change when a run resumes
    options: tuple[str, ...]  # keys of `method_options` that it reads
    highest_stage: int  # highest ZeRO stage that it supports
    splits_sequence: bool  # supports sequence parallelism (parallel.sequence)
    recomputes: bool  # supports model.activation_checkpointing
    reads_latents: bool  # accepts shards with precomputed latents in place of pixels
    reads_captions: bool  # needs a caption for every sample
    makes_videos: bool  # its result can be used by `sample` and `evaluate`

    def rules(self, config: Config) -> None:
        """Check the method's requirements on the configuration. Raises InputError."""

    def geometry(self, config: Config) -> Geometry:
        """Strides and patch side, from which token grids follow."""

    def cost(self, config: Config) -> Cost:
        """Forward FLOPs of a clip, by which packs are balanced."""

    def training_cost(self, config: Config) -> Cost | AdapterCost:
        """FLOPs of the forward and backward pass, for MFU and forecasts."""

    def learner(self, config: Config, device: torch.device) -> Learner:
        """Build the learner of a run, with initial weights read from the files that the configuration names."""

    def planned(self, config: Config) -> Learner:
        """Build the learner for a forecast: in the run's precision, without reading files; may run on fake tensors."""


class OneNetwork:
    """Base of learners with one trained network. Subclasses define `name`, `weight`, `loss` and `preview`."""

    name: str

    def loss(self, network: Any, pack: Pack) -> Loss:
        """Loss of a pack. `network` is the engine, or the network itself."""
        raise NotImplementedError(f"{type(self).__name__} has no loss")

    def step(self, engines: Engines, packs: Sequence[Pack]) -> StepResult:
        """Run the backward pass of every pack, then update the weights."""
        engine, result = engines[self.name], StepResult()
        for pack in packs:
            loss = self.loss(engine, pack)
            engine.backward(loss.sum / pack.part[1])
            result.losses.append((pack, loss))
        result.applied = engine.step()
        return result

    def validate(self, engines: Engines, pack: Pack) -> Tensor:
        """Summed loss of a held-out pack."""
        return self.loss(engines[self.name], pack).sum


@contextmanager
def precision_of(config: Config) -> Iterator[None]:
    """Context in which new tensors have the run's precision. Fake tensors can't be cast in place afterwards."""
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if config.precision is Precision.bf16 else torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def trained(networks: Mapping[str, Network]) -> Iterator[tuple[str, Network]]:
    """Yield the trained networks with their names, in order."""
    return ((name, network) for name, network in networks.items() if network.trained)
