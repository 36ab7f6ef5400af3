"""The loss of a pack, as every method reports it."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

LEVELS = 10  # equal bins of t in [0, 1] for the loss by noise level


@dataclass
class Loss:
    """Summed loss of a pack, and its breakdown for the logs. All tensors stay on the device.

    `terms` has parts of `sum` by name, without gradient, which are logged as `loss_term/NAME`. A method gives the same
    names for every pack, also for one without clips.
    """

    sum: Tensor
    level_sum: Tensor | None = None  # (LEVELS,) summed loss by noise level; None for a method without noise levels
    level_weight: Tensor | None = None  # (LEVELS,) summed loss weight of each level
    texts: tuple[int, ...] | None = None  # text tokens of each clip
    by_task: Tensor | None = None  # (2, tasks) summed loss and weight of each task, in the order of schema.TASKS
    terms: dict[str, Tensor] = field(default_factory=dict)
