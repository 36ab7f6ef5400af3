"""Muon for the matrices of blocks, AdamW for the rest, as one optimizer under ZeRO.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) orthogonalises the momentum of a complete matrix, but under
ZeRO a rank owns only a piece of it. Momentum is therefore stored in pieces, like Adam's. For an update, an all-reduce
assembles the matrices, each rank orthogonalises some of them, and a second all-reduce distributes the results. Stage 0
needs only the second. DeepSpeed's own Muon is not used: it selects parameters by name, and at stage 0 it doesn't
orthogonalise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_STEPS = 5
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of Jordan et al.: steepest at zero; singular values end in 0.7 to 1.2
_RMS = 0.2  # RMS of an update's elements, like AdamW's (Liu et al. 2025, Moonlight, arXiv 2502.16982, section 2.2)


class MatrixOptimizer(torch.optim.AdamW):
    """AdamW, with Muon for parameter groups whose `muon` is True.

    The engine sets `orthogonal` to a function that knows which pieces of which matrices a tensor contains (`Sharing`).
    `orthogonal(tensors, updates)` takes the momentum updates of a group's tensors, and returns the same pieces of the
    orthogonalised matrices. It is collective. The kernel of a convolution counts as a matrix with one row per output
    channel.
    """

    orthogonal: Callable[[Sequence[Tensor], list[Tensor]], list[Tensor]] | None = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the parameters that are in `param_groups` at the time of the call; ZeRO fills one group at a time."""
        everything = self.param_groups
        try:
            self.param_groups = [group for group in everything if not group["muon"] and group["params"]]
            if self.param_groups:
                super().step(closure)
        finally:
            self.param_groups = everything
        for group in everything:
            if group["muon"] and group["params"]:
                self._update(group)

    def _update(self, group: dict[str, Any]) -> None:
        """Apply a Muon update: orthogonalised Nesterov momentum, and decoupled weight decay."""
        updates = []
        for p in group["params"]:
            state = self.state[p]
            if not state:  # DeepSpeed creates the state by a first step with zero gradients
                state |= {"step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p)}
            state["step"] += 1
            gradient = p.grad.to(p.dtype)
            state["exp_avg"].lerp_(gradient, 1.0 - group["momentum"])
            updates.append(gradient.lerp(state["exp_avg"], group["momentum"]))
        if self.orthogonal is None:
            return
        for p, update in zip(group["params"], self.orthogonal(group["params"], updates), strict=True):
            p.mul_(1.0 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])


@dataclass(frozen=True)
class Piece:
    """This rank's piece of a matrix: elements `start` to `start + numel` when flattened, at `at` in a flat tensor."""

    matrix: int  # index of the matrix in `Flat.shapes`
    start: int
    at: int
    numel: int


@dataclass(frozen=True)
class Flat:
    """Contents of a flat tensor of the optimizer.

    `shapes` are those of its matrices, the same on every rank; `pieces` are this rank's pieces of them.
    """

    shapes: tuple[tuple[int, int], ...]
    pieces: tuple[Piece, ...]


class Sharing:
    """Computes the Muon updates of this rank's pieces. With `whole` (stage 0), every rank has complete matrices."""

    def __init__(self, flats: dict[int, Flat], whole: bool) -> None:
        self.flats, self.whole = flats, whole  # by the tensor's id

    def __call__(self, tensors: Sequence[Tensor], updates: list[Tensor]) -> list[Tensor]:
        """Orthogonalise updates in place and return them; see `MatrixOptimizer`. Collective."""
        flats = [self.flats[id(tensor)] for tensor in tensors]
        shapes = [shape for flat in flats for shape in flat.shapes]
        room = updates[0].new_zeros(sum(map(math.prod, shapes)))
        matrices = [x.view(shape) for x, shape in zip(room.split([math.prod(s) for s in shapes]), shapes, strict=True)]
        self._copy(flats, matrices, updates, inwards=True)
        ranks, rank = dist.get_world_size(), dist.get_rank()
        if ranks > 1 and not self.whole:
            dist.all_reduce(room)
        mine = matrices[rank::ranks]
        results = orthogonal(mine)
        room.zero_()
        for matrix, result in zip(mine, results, strict=True):
            matrix.copy_(result).mul_(_RMS * math.sqrt(max(matrix.shape)))
        if ranks > 1:
            dist.all_reduce(room)
        self._copy(flats, matrices, updates, inwards=False)
        return updates

    @staticmethod
    def _copy(flats: list[Flat], matrices: list[Tensor], updates: list[Tensor], inwards: bool) -> None:
        """Copy the pieces from `updates` into `matrices` (`inwards`), or back. Padding is not touched."""
        first = 0
        for flat, update in zip(flats, updates, strict=True):
            for piece in flat.pieces:
                part = matrices[first + piece.matrix].view(-1)[piece.start : piece.start + piece.numel]
                own = update.view(-1)[piece.at : piece.at + piece.numel]
                (part if inwards else own).copy_(own if inwards else part)
            first += len(flat.shapes)


def orthogonal(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Orthogonalise matrices by the Newton-Schulz iteration, so that all singular values are about 1.

    Matrices of equal shape are batched. On a GPU it runs in bf16, whose rounding errors were found harmless (Jordan et
    al.).
    """
    results: list[Tensor] = [torch.empty(0)] * len(matrices)
    by_shape: dict[tuple[int, int], list[int]] = {}
    for number, matrix in enumerate(matrices):
        by_shape.setdefault((matrix.shape[0], matrix.shape[1]), []).append(number)
    for (rows, columns), numbers in by_shape.items():
        x_BMN = torch.stack([matrices[number] for number in numbers])
        x_BMN = x_BMN.bfloat16() if x_BMN.is_cuda else x_BMN
        x_BMN = _iterated(x_BMN.mT).mT if rows > columns else _iterated(x_BMN)
        for number, x_MN in zip(numbers, x_BMN, strict=True):
            results[number] = x_MN.to(matrices[number].dtype)
    return results


def _iterated(x_BMN: Tensor) -> Tensor:
    """Run the iteration on matrices `(B, M, N)` with M <= N."""
    a, b, c = _COEFFICIENTS
    x_BMN = x_BMN / (torch.linalg.vector_norm(x_BMN, dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(_STEPS):
        square_BMM = x_BMN @ x_BMN.mT
        x_BMN = torch.baddbmm(x_BMN, torch.baddbmm(square_BMM, square_BMM, square_BMM, beta=b, alpha=c), x_BMN, beta=a)
    return x_BMN
