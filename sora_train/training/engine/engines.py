"""The engines of a run's trained networks, their averages, and one view of all their optimizer state."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from sora_train.config.schema import Config
from sora_train.methods.base import Network, trained
from sora_train.training.engine.ema import Ema
from sora_train.training.engine.optim import optimizer_of
from sora_train.training.engine.power_ema import PowerEmas
from sora_train.training.engine.zero import Engine, Fragment, OnItsWay, Pace


class Engines:
    """An engine for each trained network, in the order of the learner; frozen networks stay plain modules.

    With `whole` False the other ranks are imagined, and it isn't checked that all ranks together hold every parameter.
    """

    def __init__(self, networks: Mapping[str, Network], packs: int, config: Config, whole: bool = True) -> None:
        self._engines: dict[str, Engine] = {}
        for name, network in trained(networks):
            optimizer = optimizer_of(network, config.optim)
            passes = packs * network.passes
            self._engines[name] = Engine(name, network.module, optimizer, passes, config, whole)
        self._with_average = {name for name, network in trained(networks) if network.ema}
        kept = [f for name, engine in self._engines.items() if name in self._with_average for f in engine.fragments]
        self.fragments: list[Fragment] = [f for engine in self._engines.values() for f in engine.fragments]
        self.ema = Ema(kept, config.optim.ema_decay)
        self.powers = PowerEmas(kept, config.optim.ema_lengths)

    def __getitem__(self, name: str) -> Engine:
        return self._engines[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._engines)

    @property
    def first(self) -> Engine:
        """The engine whose loss, gradient norm and learning rate stand for the run."""
        return next(iter(self._engines.values()))

    @property
    def stage(self) -> int:
        """The ZeRO stage of all of them."""
        return self.first.stage

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every trained parameter, by NETWORK/PARAMETER."""
        return {name: shape for engine in self._engines.values() for name, shape in engine.shapes.items()}

    @property
    def loss(self) -> OnItsWay:
        """This rank's share of the last step's loss."""
        return self.first.loss

    def set_pace(self, weight: float, lr_factor: float, before_update: Callable[[], None]) -> None:
        """Say what the coming step is taken with; `before_update` is called once, before the first weights change."""
        waiting = [before_update]

        def once() -> None:
            if waiting:
                waiting.pop()()

        for engine in self._engines.values():
            engine.pace = Pace(weight, lr_factor, once)

    def figures(self) -> dict[str, float]:
        """Gradient norm and learning rate of the first engine; of others, beside the loss, under their names."""
        found = {"grad_norm": self.first.grad_norm, "lr": self.first.lr}
        for name, engine in list(self._engines.items())[1:]:
            found |= {f"grad_norm/{name}": engine.grad_norm, f"lr/{name}": engine.lr}
            found[f"loss/{name}"] = engine.loss.read()
        return found

    def update_averages(self) -> None:
        """Move every average towards the weights of the step that was just taken."""
        self.ema.update()
        self.powers.update()

    @contextmanager
    def averaged(self, *names: str) -> Iterator[None]:
        """Run networks (all that have an average, where none is named) with their averaged weights inside."""
        with ExitStack() as stack:
            for name in names or [name for name in self._engines if name in self._with_average]:
                engine = self._engines[name]
                stack.enter_context(engine.weights({f.name: self.ema.values[f.name] for f in engine.fragments}))
            yield

    def write_weights(self) -> None:
        """Set the weights that forward uses from the fp32 masters; all ranks together."""
        for engine in self._engines.values():
            engine.write_weights({f.name: f.master for f in engine.fragments})

    def set_optimizer_steps(self, count: int) -> None:
        """Set every optimizer's own step counter after a load."""
        for engine in self._engines.values():
            engine.set_optimizer_steps(count)

    def fingerprint(self) -> Tensor:
        """Two integers per parameter that change with any bit of the weights; see `Engine.fingerprint`."""
        return torch.cat([engine.fingerprint() for engine in self._engines.values()])
