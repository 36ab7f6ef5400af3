"""Solvers of the flow's ODE dx/dt = v(x, t), from noise at a later time to data at an earlier one.

A step may be of another length for every token: times are `(N, 1)`. To add a solver: a function here, its name in
`config.SOLVERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]  # x_NP, t_N1 to v_NP
Solver = Callable[[Velocity, Tensor, Sequence[Tensor]], Tensor]


def _euler(velocity: Velocity, x: Tensor, times: Sequence[Tensor]) -> Tensor:
    """First order, one evaluation a step."""
    for now, then in zip(times, times[1:], strict=False):
        x = x + (then - now) * velocity(x, now)
    return x


def _heun(velocity: Velocity, x: Tensor, times: Sequence[Tensor]) -> Tensor:
    """Second order, two evaluations a step but for the last: at t = 0 a velocity is not defined for all data."""
    for place, (now, then) in enumerate(zip(times, times[1:], strict=False)):
        slope = velocity(x, now)
        if place < len(times) - 2:
            slope = (slope + velocity(x + (then - now) * slope, then)) / 2
        x = x + (then - now) * slope
    return x


def _adams_bashforth(velocity: Velocity, x: Tensor, times: Sequence[Tensor]) -> Tensor:
    """Second order, one evaluation a step: the slope is carried on from the step before, of another length."""
    before: tuple[Tensor, Tensor] | None = None  # slope and length of the last step
    for now, then in zip(times, times[1:], strict=False):
        slope, step = velocity(x, now), then - now
        bend = 0.0 if before is None else step / (2 * before[1]) * (slope - before[0])
        x = x + step * (slope + bend)
        before = slope, step
    return x


SOLVE: dict[str, Solver] = {"euler": _euler, "heun": _heun, "adams_bashforth": _adams_bashforth}
