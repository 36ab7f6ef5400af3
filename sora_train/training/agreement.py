"""The all-reduce on the host by which the ranks agree once per step: sums over all ranks, requested one step ahead.

A rank loads the data of the next step before it computes the current one, so it can start the sum early. It sends the
counts of the next step, its stop request and its loss of the previous step, computes the current step, and then reads
the sums. They have arrived by then unless a rank is a whole step late, so normally no rank waits. The loss of a step is
therefore judged after the next step has been taken. Before a checkpoint or validation it is summed at once.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import Any

import torch
import torch.distributed as dist

from sora_train.training.parts import Step


@dataclass(frozen=True)
class Numbers:
    """Numbers that are summed over all ranks in every step: those of one rank, or the sums."""

    weight: float = 0.0  # loss weight of the packs of the next step
    arrived: float = 0.0  # samples of the next step that were loaded
    refused: float = 0.0  # samples of the next step that could not be used
    tokens: float = 0.0  # tokens of the next step
    stop: float = 0.0  # 1 if the rank got a stop signal; the sum counts these ranks
    loss: float = 0.0  # the rank's share of the loss of the previous step


class Request:
    """An all-reduce of `Numbers` over all ranks that runs in the background. Collective."""

    def __init__(self, mine: Numbers) -> None:
        self._values = torch.tensor(astuple(mine), dtype=torch.float64)
        self._work: Any = dist.all_reduce(self._values, async_op=True)

    def read(self) -> Numbers:
        """Wait for the all-reduce, and return the sums over all ranks."""
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
    """The next step, loaded while the current one is not yet computed, and its running all-reduce."""

    batch: Step | None  # None after the last step
    taken: Taken | None  # the previous step, whose loss is summed by this request; None if there is none
    request: Request
