"""Exponential moving average (EMA) of the weights, sharded like the optimizer state."""

from __future__ import annotations

import torch
from torch import Tensor

from sora_train.training.engine.fragments import Fragment


class Ema:
    """fp32 averages of this rank's fragments.

    The decay of update n is the smaller of `decay` and n / (9 + n), so that the initial weights are forgotten quickly.
    """

    def __init__(self, fragments: list[Fragment], decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.values: dict[str, Tensor] = {f.name: f.master.clone() for f in fragments}
        self._masters = [f.master for f in fragments]

    def update(self) -> None:
        """Update the averages with the current weights, after an optimizer step."""
        self.updates += 1
        decay = min(self.decay, self.updates / (9.0 + self.updates))
        if self.values:
            torch._foreach_lerp_(list(self.values.values()), self._masters, 1.0 - decay)
