"""The contract of a training method: the networks that a run trains, and one optimizer step of all of them.

A method comes in two parts. A `Method` answers from the configuration alone (geometry, cost, rules) and imports no
torch, so that mistakes are answered at once. Its `learner` holds the networks and does the steps. Methods are found by
name in `config/registry.py`; a plugin calls `METHODS.register(NAME, method)`.
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

    `rates` are the parts that the optimizer moves, each with a factor on the learning rate; None freezes the network.
    An average of the weights is kept where `ema` is set. `passes` backward passes go through it for each pack.
    `matrices` are the modules in which Muon may move the weights of linear layers: blocks, never what embeds,
    modulates or projects to the output.
    """

    module: nn.Module
    rates: list[tuple[nn.Module, float]] | None
    ema: bool = True
    passes: int = 1
    matrices: Sequence[nn.Module] = ()

    @property
    def trained(self) -> bool:
        """Whether an engine moves its weights."""
        return self.rates is not None


@dataclass
class StepResult:
    """One optimizer step: whether every engine applied it, and the loss of each pack."""

    applied: bool = False
    losses: list[tuple[Pack, Loss]] = field(default_factory=list)


class Engine(Protocol):
    """A trained network under ZeRO, as a method sees it."""

    def __call__(self, *arguments: Any) -> Any:
        """Run the network forward."""

    def backward(self, loss_sum: Tensor) -> None:
        """Back-propagate a pack's summed loss; it is divided by the step's weight over all ranks."""

    def step(self) -> bool:
        """Update the weights after the last backward pass; False if nothing was changed since a value wasn't finite."""


class Engines(Protocol):
    """The engines of a method's trained networks, by name."""

    def __getitem__(self, name: str) -> Engine:
        """The engine of a network."""

    def averaged(self, *names: str) -> AbstractContextManager[None]:
        """Run these networks with their averaged (EMA) weights inside; all ranks together, at any ZeRO stage."""


class Learner(Protocol):
    """The networks of a run and how they learn."""

    networks: dict[str, Network]  # the first trained one's loss is the run's loss

    def weight(self, pack: Pack) -> float:
        """The pack's share of what the step's loss is divided by, e.g. its loss-bearing tokens."""

    def step(self, engines: Engines, packs: Sequence[Pack]) -> StepResult:
        """One optimizer step: every backward pass and every `step` of every engine."""

    def validate(self, engines: Engines, pack: Pack) -> Tensor:
        """Summed loss of a held-out pack, at noise that depends on its clips alone."""

    def preview(self, engines: Engines, clip: Clip) -> np.ndarray:
        """Frames `(T, H, W, 3)` uint8 that show what the networks make of a clip."""


class Method(Protocol):
    """A method before anything is built."""

    fixed: tuple[str, ...]  # sections and keys that shape the weights: they may not change in a run
    highest_stage: int  # of ZeRO
    splits_sequence: bool  # whether ranks can share a pack's tokens (parallel.sequence)
    recomputes: bool  # whether model.activation_checkpointing is heeded
    reads_latents: bool  # whether shards may hold latents in place of pixels
    makes_videos: bool  # whether `sample` and `evaluate` can use the result

    def rules(self, config: Config) -> None:
        """Check what the method asks of the configuration. Raises InputError."""

    def geometry(self, config: Config) -> Geometry:
        """The token grid of a run."""

    def cost(self, config: Config) -> Cost:
        """Forward FLOPs of a clip, by which packs are planned."""

    def training_cost(self, config: Config) -> Cost | AdapterCost:
        """FLOPs of training, for MFU and forecasts."""

    def learner(self, config: Config, device: torch.device) -> Learner:
        """The networks as a run begins with them, their files read."""

    def planned(self, config: Config) -> Learner:
        """The networks for a forecast: in the run's precision, no file read; tensors may have no memory."""


class OneNetwork:
    """A learner with one trained network. Subclasses give `name`, `weight`, `loss` and `preview`."""

    name: str

    def loss(self, network: Any, pack: Pack) -> Loss:
        """Loss of a pack; `network` runs the network."""
        raise NotImplementedError(f"{type(self).__name__} has no loss")

    def step(self, engines: Engines, packs: Sequence[Pack]) -> StepResult:
        """Backward pass of every pack, then the update."""
        engine, result = engines[self.name], StepResult()
        for pack in packs:
            loss = self.loss(engine, pack)
            engine.backward(loss.sum)
            result.losses.append((pack, loss))
        result.applied = engine.step()
        return result

    def validate(self, engines: Engines, pack: Pack) -> Tensor:
        """Summed loss of a held-out pack."""
        return self.loss(engines[self.name], pack).sum


@contextmanager
def precision_of(config: Config) -> Iterator[None]:
    """Make tensors in the run's precision inside: those without memory can't be cast in place later."""
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if config.precision is Precision.bf16 else torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def trained(networks: Mapping[str, Network]) -> Iterator[tuple[str, Network]]:
    """The networks that are trained, in order."""
    return ((name, network) for name, network in networks.items() if network.trained)
