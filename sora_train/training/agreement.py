"""The one agreement that the ranks reach in a step: sums over all of them, sent a step ahead, on the host.

Before a rank computes a step it has the data of the next one, so it sends the next step's numbers, its stop request and
its loss of the step before, and reads the sums when it has computed. They have arrived by then unless a rank is late by
a whole step, so nobody waits for them. The loss of a step is thus judged when the next one has been taken; where
something is about to rest on the step (a checkpoint, a validation), it is asked for at once.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import Any

import torch
import torch.distributed as dist

from sora_train.training.parts import Step


@dataclass(frozen=True)
class Numbers:
    """Numbers of one rank, or their sums over all ranks."""

    weight: float = 0.0  # loss weight of the packs of the next step
    arrived: float = 0.0  # samples of the next step
    refused: float = 0.0  # samples of the next step
    tokens: float = 0.0  # of the next step
    stop: float = 0.0  # 1 for a stop request
    loss: float = 0.0  # share of the loss of a step that was taken


class Request:
    """Numbers that are being summed over all ranks, in the background. Collective."""

    def __init__(self, mine: Numbers) -> None:
        self._values = torch.tensor(astuple(mine), dtype=torch.float64)
        self._work: Any = dist.all_reduce(self._values, async_op=True)

    def read(self) -> Numbers:
        """Wait for the sums."""
        self._work.wait()
        return Numbers(*self._values.tolist())


@dataclass(frozen=True)
class Taken:
    """A step that was taken and whose loss over all ranks isn't known yet."""

    step: int
    position: tuple[int, ...]
    own_loss: float  # this rank's share of the loss
    applied: bool


@dataclass(frozen=True)
class Ahead:
    """The next step, asked about before the current one is computed."""

    batch: Step | None  # None behind the last step
    taken: Taken | None  # the step whose loss is part of the request
    request: Request
