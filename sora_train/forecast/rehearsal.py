"""Rehearsal: one step of one rank of a job, without the other ranks.

Runs the real network under the real ZeRO engine on a process group whose collectives return at once. Memory and time of
the rank are therefore those of the job, but data from other ranks is missing, and so the loss is meaningless.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from sora_train.config.registry import METHODS
from sora_train.config.schema import Config
from sora_train.core.batch import Pack
from sora_train.core.world import World
from sora_train.forecast.trace import Recorder, Size, clip_of
from sora_train.methods.base import trained
from sora_train.training.engine.engines import Engines
from sora_train.training.engine.process_group import connect, disconnect


@dataclass(frozen=True)
class Rehearsal:
    """Measured memory and time of one step of one rank."""

    start: int  # peak bytes of tensors while the engine was built
    peak: int  # peak bytes of tensors in the step
    seconds: float
    owned: int  # number of master weights that the rank owns
    parameters: int


def rehearse(config: Config, ranks: int, passes: int, sizes: list[Size]) -> Rehearsal:
    """Run one step as rank 0 of `ranks`, in `passes` passes over clips of the given sizes (frames, height, width)."""
    device = connect(World(size=ranks), rehearsal=True)
    try:
        with Recorder() as recorder:
            learner = METHODS.get(config.method).planned(config)
            for network in learner.networks.values():
                network.module.to(device)
            parameters = sum(p.numel() for _, network in trained(learner.networks) for p in network.module.parameters())
            engines = Engines(learner.networks, passes, config, whole=False)
            before, recorder.peak = recorder.peak, recorder.live
            start = time.monotonic()
            packs = [
                Pack([clip_of(number * len(sizes) + n, size) for n, size in enumerate(sizes)])
                for number in range(passes)
            ]
            engines.set_pace(sum(map(learner.weight, packs)), 1.0, lambda: None)
            if learner.step(engines, packs).applied:
                engines.update_averages()
            seconds = time.monotonic() - start
        owned = sum(f.master.numel() for f in engines.fragments)
        return Rehearsal(before, recorder.peak, seconds, owned, parameters)
    finally:
        disconnect()
