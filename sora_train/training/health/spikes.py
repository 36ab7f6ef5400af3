"""Detection of bad steps: non-finite values, loss spikes, and weights that differ between ranks.

A spike is a loss far above the median of the last losses, in units of their median absolute deviation (MAD; 1.4826 MAD
is one standard deviation of a normal distribution, Rousseeuw and Croux 1993), for several consecutive steps. Every rank
evaluates the same all-reduced losses, so all reach the same verdict.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sora_train.config.schema import GuardConfig

_FLOOR = 0.02  # lower bound of the deviation as a share of the median, so that a nearly constant loss has no spikes
_LEAST = 20  # losses that must be known before one can count as a spike

Position = tuple[int, ...]


@dataclass(frozen=True)
class Verdict:
    """Decision to roll back to a checkpoint, with its reason."""

    reason: str
    first: int  # number of the first bad step
    guilty: tuple[tuple[int, Position], ...]  # number and position of the steps to leave out


class Health:
    """Judges every step of a run from its loss. Its state is saved in checkpoints."""

    def __init__(self, limits: GuardConfig) -> None:
        self.limits = limits
        self.not_finite = self.high = 0  # consecutive bad steps so far
        self._losses: deque[float] = deque(maxlen=limits.spike_window)
        remembered = max(limits.max_bad_steps, limits.spike_steps) + limits.leave_out_before
        self._recent: deque[tuple[int, Position]] = deque(maxlen=remembered)

    def judge(self, step: int, position: Position, loss: float, applied: bool) -> Verdict | None:
        """Judge a step that was taken; steps come in order.

        Args:
            step: Number of the step.
            position: Position of the step in the plan.
            loss: Its loss, over all ranks.
            applied: False if the update was skipped.

        Returns:
            A verdict if a limit of `guard` is reached.
        """
        self._recent.append((step, position))
        if not applied or not math.isfinite(loss):
            self.not_finite += 1
            return self._verdict(self.not_finite, self.limits.max_bad_steps, step, "were not finite")
        self.not_finite = 0
        self.high = self.high + 1 if self._is_spike(loss) else 0
        median = statistics.median(self._losses) if self._losses else loss
        self._losses.append(loss)
        return self._verdict(
            self.high, self.limits.spike_steps, step, f"had a loss of up to {loss:.4g} after a median of {median:.4g}"
        )

    def forget(self) -> None:
        """Clear all state, after a verdict for which no checkpoint to roll back to exists."""
        self.not_finite = self.high = 0
        self._losses.clear()
        self._recent.clear()

    def state(self) -> dict[str, Any]:
        """State for the checkpoint, so that a resumed run reaches the same verdicts."""
        recent = [[step, list(position)] for step, position in self._recent]
        return {"not_finite": self.not_finite, "high": self.high, "losses": list(self._losses), "recent": recent}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore the state from a checkpoint; missing entries (of an older version) are empty."""
        self.forget()
        self.not_finite, self.high = state.get("not_finite", 0), state.get("high", 0)
        self._losses.extend(state.get("losses", []))
        self._recent.extend((step, tuple(position)) for step, position in state.get("recent", []))

    def _is_spike(self, loss: float) -> bool:
        if not self.limits.spike or len(self._losses) < min(_LEAST, self.limits.spike_window):
            return False
        median = statistics.median(self._losses)
        deviation = 1.4826 * statistics.median(abs(value - median) for value in self._losses)
        return loss > median + self.limits.spike * max(deviation, _FLOOR * abs(median))

    def _verdict(self, count: int, limit: int, step: int, what: str) -> Verdict | None:
        if count < limit:
            return None
        first = step - count + 1
        guilty = tuple((s, p) for s, p in self._recent if s >= first - self.limits.leave_out_before)
        return Verdict(f"steps {first} to {step} {what}", first, guilty)


def differing_ranks(fingerprint: Tensor) -> list[int]:
    """Ranks whose fingerprint differs from the majority's (in a tie, from the lowest rank's). Collective."""
    if dist.get_world_size() == 1 or not fingerprint.numel():
        return []
    bounds = torch.cat((fingerprint, -fingerprint))
    dist.all_reduce(bounds, op=dist.ReduceOp.MAX)
    highest, lowest = bounds.chunk(2)
    if torch.equal(highest, -lowest):
        return []
    rows = [torch.empty_like(fingerprint) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, fingerprint)
    keys = [tuple(row.tolist()) for row in rows]
    usual = max(keys, key=lambda key: (keys.count(key), -keys.index(key)))
    return [rank for rank, key in enumerate(keys) if key != usual]
