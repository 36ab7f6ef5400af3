"""The engines of all trained networks of a run, with their EMAs and optimizer state as one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from sora_train.config.schema import Config
from sora_train.methods.base import Network, trained
from sora_train.training.engine.ema import Ema
from sora_train.training.engine.fragments import Fragment
from sora_train.training.engine.optim import check_patterns, optimizer_of
from sora_train.training.engine.power_ema import PowerEmas
from sora_train.training.engine.zero import Engine, OnItsWay, Pace


class Engines:
    """One engine per trained network, in the learner's order; frozen networks stay plain modules.

    Args:
        networks: All networks of the learner, by name.
        packs: Packs per step and rank.
        config: Configuration of the run.
        whole: Check that the master weights of all ranks together cover every parameter. False in a forecast, where
            other ranks don't exist.
    """

    def __init__(self, networks: Mapping[str, Network], packs: int, config: Config, whole: bool = True) -> None:
        self._engines: dict[str, Engine] = {}
        check_patterns(networks.values(), config.optim.rates)
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
        """The first engine, whose loss, gradient norm and learning rate are reported as those of the run."""
        return next(iter(self._engines.values()))

    @property
    def stage(self) -> int:
        """ZeRO stage of all engines."""
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
        """Set the parameters of the next step.

        Args:
            weight: Loss weight over all ranks, by which summed losses are divided.
            lr_factor: Factor on all learning rates.
            before_update: Called once, before the first engine changes weights.
        """
        waiting = [before_update]

        def once() -> None:
            if waiting:
                waiting.pop()()

        for engine in self._engines.values():
            engine.pace = Pace(weight, lr_factor, once)

    def figures(self) -> dict[str, float]:
        """Metrics of the last step by name.

        Gradient norm and learning rate of the first engine (`grad_norm`, `lr`); for every other engine these and its
        loss, as `FIGURE/NETWORK`.
        """
        found = {"grad_norm": self.first.grad_norm, "lr": self.first.lr}
        for name, engine in list(self._engines.items())[1:]:
            more = {"grad_norm": engine.grad_norm, "lr": engine.lr, "loss": engine.loss.read()}
            found |= {"/".join((key, name)): value for key, value in more.items()}
        return found

    def update_averages(self) -> None:
        """Update all averages with the current weights, after an optimizer step."""
        self.ema.update()
        self.powers.update()

    @contextmanager
    def averaged(self, *names: str) -> Iterator[None]:
        """Context in which networks (default: all with an average) run with their averaged weights. Collective."""
        with ExitStack() as stack:
            for name in names or [name for name in self._engines if name in self._with_average]:
                engine = self._engines[name]
                stack.enter_context(engine.weights({f.name: self.ema.values[f.name] for f in engine.fragments}))
            yield

    def write_weights(self) -> None:
        """Set the weights used in the forward pass from the fp32 master weights. Collective."""
        for engine in self._engines.values():
            engine.write_weights({f.name: f.master for f in engine.fragments})

    def set_optimizer_steps(self, count: int) -> None:
        """Set the step counter of every optimizer, after a load."""
        for engine in self._engines.values():
            engine.set_optimizer_steps(count)

    def fingerprint(self) -> Tensor:
        """Checksums of the weights of all engines; see `Engine.fingerprint`."""
        return torch.cat([engine.fingerprint() for engine in self._engines.values()])
