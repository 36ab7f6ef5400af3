"""One step of one rank of a job whose other ranks aren't there.

Runs the real network under the real ZeRO engine on a process group whose collectives return at once, so what one rank
holds and does is that of the job; what it would have received from the others is missing, and its loss says nothing.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from sora_train.config.schema import Config
from sora_train.core.batch import Pack
from sora_train.core.world import World
from sora_train.forecast.trace import Recorder, Size, Untrained, clip_of
from sora_train.training.engine.ema import Ema
from sora_train.training.engine.optim import adamw
from sora_train.training.engine.power_ema import PowerEmas
from sora_train.training.engine.zero import Engine, connect, disconnect


@dataclass(frozen=True)
class Rehearsal:
    """What one step of one rank took."""

    start: int  # most bytes of tensors until the engine stood
    peak: int  # and after it
    seconds: float
    owned: int  # elements of the optimizer state that the rank holds
    parameters: int


class _Alone(Engine):
    """The engine without the check that all ranks' fragments together cover the parameters: the others are missing."""

    def _check_fragments(self) -> None:
        return


def rehearse(config: Config, ranks: int, passes: int, sizes: list[Size], untrained: Untrained) -> Rehearsal:
    """Take one step as rank 0 of `ranks`, with passes of clips of these sizes (frames, height, width)."""
    device = connect(World(size=ranks), rehearsal=True)
    try:
        with Recorder() as recorder:
            network, task, _frozen = untrained(config)
            network.to(device)
            parameters = sum(p.numel() for p in network.parameters())
            optimizer = adamw([(network, 1.0)], config.optim)
            engine = _Alone(network, optimizer, config.precision, passes, config.optim.clip, config.deepspeed)
            before, recorder.peak = recorder.peak, recorder.live
            ema = Ema(engine.fragments, config.optim.ema_decay)
            powers = PowerEmas(engine.fragments, config.optim.ema_lengths)
            start = time.monotonic()
            for number in range(passes):
                pack = Pack([clip_of(number * len(sizes) + n, size) for n, size in enumerate(sizes)])
                engine.backward(task.loss(engine, pack, device).sum, task.weight(pack) * passes)
            if engine.step(1.0):
                ema.update()
                powers.update()
            seconds = time.monotonic() - start
        return Rehearsal(before, recorder.peak, seconds, sum(f.master.numel() for f in engine.fragments), parameters)
    finally:
        disconnect()
