"""Solvers of the flow's ODE dx/dt = v(x, t), backwards in time from noise (t = 1) to data (t = 0).

Times are `(N, 1)`: each token may have its own, since the shift depends on the clip. To add a solver, write a function
here and add its name to `config.schema.SOLVERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]  # x_NP, t_N1 to v_NP
Solver = Callable[[Velocity, Tensor, Sequence[Tensor]], Tensor]


def _euler(velocity: Velocity, x: Tensor, times: Sequence[Tensor]) -> Tensor:
    """Euler's method: first order, one evaluation per step."""
    for now, then in zip(times, times[1:], strict=False):
        x = x + (then - now) * velocity(x, now)
    return x


def _heun(velocity: Velocity, x: Tensor, times: Sequence[Tensor]) -> Tensor:
    """Heun's method: second order, two evaluations per step. The last is an Euler step, to not evaluate at t = 0."""
    for place, (now, then) in enumerate(zip(times, times[1:], strict=False)):
        slope = velocity(x, now)
        if place < len(times) - 2:
            slope = (slope + velocity(x + (then - now) * slope, then)) / 2
        x = x + (then - now) * slope
    return x


def _adams_bashforth(velocity: Velocity, x: Tensor, times: Sequence[Tensor]) -> Tensor:
    """Two-step Adams-Bashforth for unequal steps: second order, one evaluation per step."""
    before: tuple[Tensor, Tensor] | None = None  # slope and length of the last step
    for now, then in zip(times, times[1:], strict=False):
        slope, step = velocity(x, now), then - now
        bend = 0.0 if before is None else step / (2 * before[1]) * (slope - before[0])
        x = x + step * (slope + bend)
        before = slope, step
    return x


SOLVE: dict[str, Solver] = {"euler": _euler, "heun": _heun, "adams_bashforth": _adams_bashforth}
