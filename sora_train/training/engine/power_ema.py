"""Power-function EMAs of several lengths, and post-hoc EMA: averages of other lengths from snapshots (Karras 2024).

A power-function average weights the parameters of step tau by tau^gamma (Karras et al. 2024, arXiv 2312.02696, section
3.1). Its window grows with the run: its *length* sigma_rel = standard deviation of the weighting / steps so far is
constant. Snapshots of two lengths, taken along the run, approximate averages of other lengths by linear combination;
`combination` computes the factors (appendix C). For one fixed decay, `engine/ema.py` is enough.
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
from sora_train.training.engine.fragments import Fragment
from sora_train.training.state.checkpoint import Checkpoints
from sora_train.training.state.checkpoint_format import load_full, read_state, shares, verify
from sora_train.training.state.files import remove_folder
from sora_train.training.state.mirror import Mirror


def gamma_of(length: float) -> float:
    """Exponent gamma for a relative length in (0, 0.28) (algorithm 2 of the paper)."""
    # (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) = length^2, solved for its largest root
    inverse = length**-2
    return float(np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse]).real.max())


def kind_of(length: float) -> str:
    """Kind under which a checkpoint stores the average of a length."""
    return f"ema-{length:g}"


class PowerEmas:
    """fp32 averages of this rank's fragments, one set per length. After the first update they equal the weights."""

    def __init__(self, fragments: list[Fragment], lengths: Sequence[float]) -> None:
        self.lengths, self.updates = list(lengths), 0
        self._fragments = fragments
        self.values = {kind_of(length): {f.name: f.master.clone() for f in fragments} for length in lengths}
        self._exponents = [gamma_of(length) + 1.0 for length in lengths]

    def update(self) -> None:
        """Update the averages with the current weights, after an optimizer step."""
        self.updates += 1
        masters = [f.master for f in self._fragments]
        if not masters:
            return
        for exponent, values in zip(self._exponents, self.values.values(), strict=True):
            decay = (1.0 - 1.0 / self.updates) ** exponent
            torch._foreach_lerp_(list(values.values()), masters, 1.0 - decay)

    def state(self) -> dict[str, Any]:
        """Lengths and number of updates, for state.json; empty without averages."""
        return {"ema_lengths": self.lengths, "ema_power_updates": self.updates} if self.lengths else {}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore the number of updates. Raises InputError if the checkpoint lacks the average of a length."""
        saved = state.get("ema_lengths", [])
        if missing := sorted(set(self.lengths) - set(saved)):
            raise InputError(
                f"optim.ema_lengths={self.lengths}: the checkpoint of step {state['step']} has "
                f"{saved or 'none'}, and an average of length {missing[0]} can't begin in the middle of a run; "
                "leave it out, or choose another run_dir"
            )
        self.updates = state.get("ema_power_updates", 0)


class Snapshots:
    """Snapshots of the averages along the run, in `run_dir/snapshots` in the format of a checkpoint.

    At most `limit` are kept, evenly over the whole run (see `thinned`). All methods are collective.
    """

    def __init__(self, run_dir: Path, emas: PowerEmas, every: int, limit: int, mirror: Mirror | None = None) -> None:
        self.emas, self.every, self.limit = emas, every, limit
        self._checkpoints = Checkpoints(run_dir / "snapshots", sys.maxsize, mirror=mirror)

    def save(self, step: int, fragments: Sequence[Fragment], split: tuple[int, int] | None, shapes: Any) -> None:
        """Start a snapshot, which is written in the background, and delete older ones so that at most `limit` remain.

        Args:
            step: Step of the run.
            fragments: This rank's fragments.
            split: This rank's share of the tensors, see `checkpoint_format.shares`.
            shapes: Shape of every parameter by name.
        """
        self._checkpoints.wait()
        folder = self._checkpoints.folder
        if self._checkpoints.rank == 0:
            there = sorted(path.name for path in folder.glob("step-*"))
            kept = thinned([int(name.removeprefix("step-")) for name in there], self.every, self.limit - 1)
            for name in there:
                uploading = self._checkpoints.mirror and self._checkpoints.mirror.busy == folder / name
                if int(name.removeprefix("step-")) not in kept and not uploading:  # else deleted by the next save
                    remove_folder(folder / name)
        mine = shares(fragments, self.emas.values, split)
        self._checkpoints.save(step, mine, {"step": step, "shapes": shapes, **self.emas.state()})

    def discard_after(self, step: int) -> None:
        """Delete snapshots of steps after `step`."""
        self._checkpoints.wait()
        self._checkpoints.discard_after(step)

    def settle(self) -> None:
        """Wait until the tensors of the snapshot under way are copied."""
        self._checkpoints.settle()

    def wait(self, limit_s: float | None = None) -> bool:
        """Wait for the snapshot under way, at most `limit_s` seconds; True if it was written."""
        return self._checkpoints.wait(limit_s)


def thinned(steps: Sequence[int], every: int, limit: int) -> set[int]:
    """Choose at most `limit` of the steps: the multiples of the smallest `every` * 2^n that are few enough."""
    spacing = every
    while sum(step % spacing == 0 for step in steps) > limit:
        spacing *= 2
    return {step for step in steps if step % spacing == 0}


def combination(snapshots: Sequence[tuple[float, float]], length: float, step: float) -> tuple[list[float], float]:
    """Compute the factors of a linear combination of snapshots that approximates an average.

    Least squares over the weightings of steps (appendix C of the paper).

    Args:
        snapshots: (step, length) of each snapshot.
        length: Length of the wanted average.
        step: Step of the wanted average.

    Returns:
        A factor for each snapshot, and the error: L2 distance between the wanted and the combined weighting, relative
        to the wanted one's norm.
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
    """Integral of the product of two weightings, (gamma + 1) tau^gamma / step^(gamma + 1) on [0, step]."""
    ratio = steps_a / steps_b
    power = np.where(steps_a < steps_b, gammas_b, -gammas_a)
    return (gammas_a + 1) * (gammas_b + 1) * ratio**power / ((gammas_a + gammas_b + 1) * np.maximum(steps_a, steps_b))


def combined(run_dir: Path, length: float) -> tuple[dict[str, Tensor], int, float]:
    """Approximate the average of any length from a run's snapshots, at the newest intact one.

    Returns:
        Weights by parameter name, the step, and the relative error of the weighting (see `combination`).

    Raises:
        InputError: The length is outside (0, 0.28), or there are no snapshots.
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
        if at > 0  # 0 if every step so far was skipped
    ]
    if not parts:
        raise InputError(f"the snapshots in {run_dir}/snapshots are from before the first step that was taken")
    factors, error = combination([(at, each) for _, each, at in parts], length, updates[-1])
    total: dict[str, Tensor] = {}
    for (path, each, _), factor in zip(parts, factors, strict=True):
        for name, values in load_full(path, kind_of(each)).items():
            total.setdefault(name, torch.zeros(values.shape, dtype=torch.float64)).add_(values.double(), alpha=factor)
    return {name: values.float() for name, values in total.items()}, int(states[-1]["step"]), error
