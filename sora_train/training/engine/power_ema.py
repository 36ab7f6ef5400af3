"""Several averages of the weights at once, and any other made of them after training (Karras et al. 2024).

A *power-function* average weighs the weights of step tau by tau^gamma (arXiv 2312.02696, section 3.1): its memory grows
with the run, so that its *length*, its relative width sigma_rel = deviation of the weighting / steps so far, stays the
same. Snapshots of two lengths, taken along the run, span the average of any length close by: `combination` has the
factors (appendix C). Where one length is kept and never read again, `training/ema.py` is enough.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sora_train.core.cli import InputError
from sora_train.training.engine.zero import Fragment
from sora_train.training.state.checkpoint import Checkpoints, load_full, read_state, shares, verify
from sora_train.training.state.files import remove_folder
from sora_train.training.state.mirror import Mirror


def gamma_of(length: float) -> float:
    """The exponent of a relative length, in (0, 0.28) (algorithm 2 of the paper)."""
    # (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) = length^2, solved for its largest root
    inverse = length**-2
    return float(np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse]).real.max())


def kind_of(length: float) -> str:
    """The name of an average in a checkpoint's pieces."""
    return f"ema-{length:g}"


class PowerEmas:
    """fp32 averages of this rank's fragments, one set per length; after the first step they are its weights."""

    def __init__(self, fragments: list[Fragment], lengths: Sequence[float]) -> None:
        self.lengths, self.updates = list(lengths), 0
        self._fragments = fragments
        self.values = {kind_of(length): {f.name: f.master.clone() for f in fragments} for length in lengths}
        self._exponents = [gamma_of(length) + 1.0 for length in lengths]

    def update(self) -> None:
        """Move towards the weights of the step that was just taken."""
        self.updates += 1
        masters = [f.master for f in self._fragments]
        if not masters:
            return
        for exponent, values in zip(self._exponents, self.values.values(), strict=True):
            decay = (1.0 - 1.0 / self.updates) ** exponent
            torch._foreach_lerp_(list(values.values()), masters, 1.0 - decay)

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs to know of them; nothing where there are none."""
        return {"ema_lengths": self.lengths, "ema_power_updates": self.updates} if self.lengths else {}

    def restore(self, state: dict[str, Any]) -> None:
        """Raises InputError where the checkpoint lacks a length: an average can't begin in the middle of a run."""
        saved = state.get("ema_lengths", [])
        if missing := sorted(set(self.lengths) - set(saved)):
            raise InputError(
                f"optim.ema_lengths={self.lengths}: the checkpoint of step {state['step']} has "
                f"{saved or 'none'}, and an average of length {missing[0]} can't begin in the middle of a run; "
                "leave it out, or choose another run_dir"
            )
        self.updates = state.get("ema_power_updates", 0)


class Snapshots:
    """Copies of the averages along the run, in `run_dir/snapshots` in the form of a checkpoint; all ranks together.

    At most `limit` are kept, evenly over the whole run (see `thinned`).
    """

    def __init__(self, run_dir: Path, emas: PowerEmas, every: int, limit: int, mirror: Mirror | None = None) -> None:
        self.emas, self.every, self.limit = emas, every, limit
        self._checkpoints = Checkpoints(run_dir / "snapshots", sys.maxsize, mirror=mirror)

    def save(self, step: int, fragments: Sequence[Fragment], split: tuple[int, int] | None, shapes: Any) -> None:
        """Copy now, write in the background, and drop what the one before made too many."""
        self._checkpoints.wait()
        folder = self._checkpoints.folder
        if self._checkpoints.rank == 0:
            there = sorted(path.name for path in folder.glob("step-*"))
            kept = thinned([int(name.removeprefix("step-")) for name in there], self.every, self.limit - 1)
            for name in there:
                uploading = self._checkpoints.mirror and self._checkpoints.mirror.busy == folder / name
                if int(name.removeprefix("step-")) not in kept and not uploading:  # it goes with the next one
                    remove_folder(folder / name)
        mine = shares(fragments, self.emas.values, split)
        self._checkpoints.save(step, mine, {"step": step, "shapes": shapes, **self.emas.state()})

    def discard_after(self, step: int) -> None:
        """Remove those of later steps."""
        self._checkpoints.wait()
        self._checkpoints.discard_after(step)

    def settle(self) -> None:
        """Wait until the one under way is copied."""
        self._checkpoints.settle()

    def wait(self, limit_s: float | None = None) -> bool:
        """Wait for the one under way, at most so many seconds; whether it was written."""
        return self._checkpoints.wait(limit_s)


def thinned(steps: Sequence[int], every: int, limit: int) -> set[int]:
    """At most `limit` of the steps: all multiples of the smallest `every` * 2^n that leaves few enough."""
    spacing = every
    while sum(step % spacing == 0 for step in steps) > limit:
        spacing *= 2
    return {step for step in steps if step % spacing == 0}


def combination(snapshots: Sequence[tuple[float, float]], length: float, step: float) -> tuple[list[float], float]:
    """Factors of snapshots (step, length) whose sum comes closest to the average of `length` at `step`, and its error.

    Least squares over the weightings of the steps (appendix C of the paper). The error is the L2 distance between the
    wanted weighting and the combined one, relative to the wanted one's norm.
    """
    steps = np.array([at for at, _ in snapshots], dtype=np.float64)
    gammas = np.array([gamma_of(each) for _, each in snapshots])
    gram = _inner(steps[:, None], gammas[:, None], steps[None, :], gammas[None, :])
    wanted, gamma = np.float64(step), np.float64(gamma_of(length))
    right = _inner(steps, gammas, wanted, gamma)
    factors = np.linalg.lstsq(gram, right, rcond=1e-13)[0]
    norm = _inner(wanted, gamma, wanted, gamma)
    squared = norm - 2.0 * factors @ right + factors @ gram @ factors
    return factors.tolist(), math.sqrt(max(float(squared), 0.0) / float(norm))


def _inner(steps_a: Any, gammas_a: Any, steps_b: Any, gammas_b: Any) -> Any:
    """Integral of the product of two weightings (gamma + 1) tau^gamma / step^(gamma + 1) on [0, step]."""
    ratio = steps_a / steps_b
    power = np.where(steps_a < steps_b, gammas_b, -gammas_a)
    return (gammas_a + 1) * (gammas_b + 1) * ratio**power / ((gammas_a + gammas_b + 1) * np.maximum(steps_a, steps_b))


def combined(run_dir: Path, length: float) -> tuple[dict[str, Tensor], int, float]:
    """The average of any length at the newest intact snapshot of a run: by parameter name; its step; its error.

    Raises InputError for a length outside (0, 0.28), and without snapshots.
    """
    if not 0.0 < length < 0.28:
        raise InputError(f"ema_length={length:g} must be in (0, 0.28); optim.ema_lengths has those that were kept")
    intact = [path for path in sorted((run_dir / "snapshots").glob("step-*")) if verify(path) is None]
    if not intact:
        raise InputError(f"no snapshots in {run_dir}/snapshots; train with optim.ema_lengths=[0.05,0.1]")
    states = [read_state(path) for path in intact]
    updates = [state["ema_power_updates"] for state in states]
    parts = [
        (path, each, at)
        for path, state, at in zip(intact, states, updates, strict=True)
        for each in state["ema_lengths"]
        if at > 0  # not every step so far was skipped
    ]
    if not parts:
        raise InputError(f"the snapshots in {run_dir}/snapshots are from before the first step that was taken")
    factors, error = combination([(at, each) for _, each, at in parts], length, updates[-1])
    total: dict[str, Tensor] = {}
    for (path, each, _), factor in zip(parts, factors, strict=True):
        for name, values in load_full(path, kind_of(each)).items():
            total.setdefault(name, torch.zeros(values.shape, dtype=torch.float64)).add_(values.double(), alpha=factor)
    return {name: values.float() for name, values in total.items()}, int(states[-1]["step"]), error
