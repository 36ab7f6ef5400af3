"""Fragments: the parts of parameters whose fp32 master weights and optimizer state a rank owns.

EMA and checkpoints work on fragments, as live 1-D views, and so don't depend on the ZeRO stage or on how it partitions.
The DeepSpeed internals used here were checked against DeepSpeed 0.19; `Partition.check` verifies them at every start.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sora_train.core.cli import InputError
from sora_train.training.engine.muon import Flat, Piece

MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam; Muon has the first


@dataclass(frozen=True)
class Fragment:
    """This rank's part of one flattened parameter: elements start .. start + numel."""

    name: str  # NETWORK/PARAMETER
    start: int
    master: Tensor  # fp32 master weights, 1-D
    states: dict[str, Tensor]  # optimizer state by name (`MOMENTS`), 1-D


@dataclass(frozen=True)
class Trained:
    """Names and shapes of a network's trained parameters, recorded before DeepSpeed changes the shapes."""

    names: dict[Any, str]  # NETWORK/PARAMETER, by parameter
    shapes: dict[str, tuple[int, ...]]  # by name
    matrices: frozenset[str]  # names of those that Muon updates

    @classmethod
    def of(cls, name: str, network: nn.Module, optimizer: torch.optim.Optimizer) -> Trained:
        """Record the trained parameters of a network; `name` is the prefix of their names."""
        names: dict[Any, str] = {p: f"{name}/{key}" for key, p in network.named_parameters() if p.requires_grad}
        muon = [group for group in optimizer.param_groups if group.get("muon")]
        matrices = frozenset(names[p] for group in muon for p in group["params"])
        return cls(names, {name: tuple(p.shape) for p, name in names.items()}, matrices)


class Partition:
    """Master weights and optimizer state of a network on this rank, where DeepSpeed keeps them.

    Args:
        zero: DeepSpeed's optimizer around ours; ours itself at stage 0 in fp32.
        optimizer: Our optimizer.
        trained: The trained parameters.
        stage: ZeRO stage.
        fp32: True if the weights of the forward pass are fp32.
    """

    def __init__(self, zero: Any, optimizer: torch.optim.Optimizer, trained: Trained, stage: int, fp32: bool) -> None:
        self.zero, self.stage, self.fp32 = zero, stage, fp32
        self.names, self.shapes, self.matrices = trained.names, trained.shapes, trained.matrices
        self.inner: torch.optim.Optimizer = zero if zero is optimizer else zero.optimizer
        self._create_moments()
        self.fragments = sorted(self._fragments(), key=lambda f: f.name)

    def flats(self) -> dict[int, Flat]:
        """Locations of the matrix pieces that Muon updates, by the `id` of the optimizer tensor that contains them."""
        mine = {f.name: f for f in self.fragments}
        found = {}
        for flat, parameters in self._masters():
            names = [self.names[p] for p in parameters]
            if names[0] not in self.matrices:
                continue
            pieces = [
                Piece(number, mine[name].start, self._place(mine[name].master, flat), mine[name].master.numel())
                for number, name in enumerate(names)
                if name in mine
            ]
            shapes = tuple((shape[0], math.prod(shape[1:])) for shape in map(self.shapes.__getitem__, names))
            found[id(flat)] = Flat(shapes, tuple(pieces))
        return found

    def check(self, whole: bool) -> None:
        """Check that this rank's master weights equal the corresponding elements of the parameters.

        With `whole`, also check that the fragments of all ranks cover every parameter exactly once (collective).
        Raises InputError if DeepSpeed's internals aren't as expected.
        """
        params = {name: p for p, name in self.names.items()}
        covered = torch.zeros(len(params), dtype=torch.int64)
        order = {name: i for i, name in enumerate(sorted(params))}
        for f in self.fragments:
            p = params[f.name]
            mine = (
                p.ds_tensor.data[: f.master.numel()]
                if self.stage == 3
                else p.data.view(-1)[f.start :][: f.master.numel()]
            )
            if not torch.equal(mine, f.master.to(mine.dtype)):
                raise InputError(
                    f"DeepSpeed {version('deepspeed')} keeps the master weights of {f.name} elsewhere than expected; "
                    "remove unusual keys under deepspeed.zero_optimization, or use DeepSpeed 0.19"
                )
            covered[order[f.name]] += f.master.numel() if self.stage or dist.get_rank() == 0 else 0
        if not whole:
            return
        dist.all_reduce(covered)
        sizes = torch.tensor([torch.Size(self.shapes[name]).numel() for name in order])
        if not torch.equal(covered, sizes):
            raise InputError(
                f"DeepSpeed {version('deepspeed')}: the optimizer state doesn't cover every parameter once"
            )

    def _create_moments(self) -> None:
        """Create Adam's state before the first step, so that a checkpoint can be loaded into it.

        At stage 0 in bf16, DeepSpeed creates it by a step with zero gradients. That step decays the weights and counts
        in Adam's bias correction (which makes the first updates up to a quarter too small), so its effects are undone.
        """
        z, inner = self.zero, self.inner
        for parameter in self.names if self.stage == 0 and not self.fp32 else ():
            self._master_of(parameter).data.copy_(parameter.data)
        for p, parameters in self._masters():
            moments = self._moments(parameters[0])
            zeros = {moment: torch.zeros_like(p.data, dtype=torch.float32) for moment in moments}
            inner.state[p] |= {"step": torch.zeros((), dtype=torch.float32, device=p.device), **zeros}
        if self.stage in (1, 2) and hasattr(z, "_lazy_init_hp_params_optimizer_state"):
            z._lazy_init_hp_params_optimizer_state()

    def _masters(self) -> list[tuple[Tensor, list[nn.Parameter]]]:
        """Tensors that the inner optimizer updates, each with the parameters whose pieces it contains."""
        z = self.zero
        if self.stage == 3:  # the optimizer's own groups are empty between steps
            return list(zip(z.fp32_partitioned_groups_flat, z.fp16_groups, strict=True))
        if self.stage in (1, 2):
            groups = getattr(z, "bit16_groups", None) or z.bf16_groups
            return list(zip(self._partitions(), groups, strict=True))
        return [(p if self.fp32 else self._master_of(p), [p]) for p in self.names]

    def _partitions(self) -> list[Tensor]:
        """This rank's part of each group's fp32 masters, at stages 1 and 2."""
        z = self.zero
        return getattr(z, "single_partition_of_fp32_groups", None) or z.fp32_groups_flat_partition

    def _moments(self, parameter: nn.Parameter) -> tuple[str, ...]:
        """Names of the optimizer states of a parameter: Adam's two moments, or for Muon the first alone."""
        return MOMENTS[:1] if self.names[parameter] in self.matrices else MOMENTS

    @staticmethod
    def _place(part: Tensor, flat: Tensor) -> int:
        """Offset of `part`, a view of the flat tensor `flat`, in elements."""
        return (part.data_ptr() - flat.data_ptr()) // flat.element_size()

    def _fragments(self) -> Iterator[Fragment]:
        for p, name in self.names.items():
            if self.stage == 3:
                yield from self._partition_fragment(p, name)
            elif self.stage in (1, 2):
                yield from self._flat_fragment(p, name)
            else:
                master = p if self.fp32 else self._master_of(p)
                state = self.inner.state[master]
                yield Fragment(name, 0, master.data.view(-1), {m: state[m].view(-1) for m in self._moments(p)})

    def _master_of(self, p: nn.Parameter) -> Tensor:
        """The fp32 copy of a bf16 parameter at stage 0."""
        z = self.zero
        for low, high in zip(z.fp16_groups, z.fp32_groups, strict=True):
            for mine, master in zip(low, high, strict=True):
                if mine is p:
                    return master
        raise RuntimeError(f"DeepSpeed keeps no fp32 copy of {self.names[p]}")

    def _flat_fragment(self, p: Any, name: str) -> Iterator[Fragment]:
        place = p._hp_mapping
        if place is None:  # owned by another rank
            return
        flat, at = self._partitions()[place.param_group_index], place.hp_fragment_address
        state, moments = self.inner.state[flat], self._moments(p)
        master, *states = (t.data.narrow(0, at.start, at.numel) for t in (flat, *(state[m] for m in moments)))
        yield Fragment(name, place.lp_fragment_address.start, master, dict(zip(moments, states, strict=True)))

    def _partition_fragment(self, p: Any, name: str) -> Iterator[Fragment]:
        z = self.zero
        start = p.partition_numel() * dist.get_rank()
        numel = min(p.partition_numel(), p.ds_numel - start)  # the rest of the last partition is padding
        if numel <= 0:
            return
        master, *states = (
            z._get_fp32_opt_state_partition(p, release_swap_buffers=True, optim_state_key=key)[0].data[:numel]
            for key in (None, *self._moments(p))
        )
        yield Fragment(name, start, master, dict(zip(self._moments(p), states, strict=True)))
