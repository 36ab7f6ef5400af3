"""DeepSpeed ZeRO behind one class, with the same interface to training and optimizer state at every stage.

A *fragment* is the part of one parameter whose fp32 master weights and Adam moments this rank owns, as live 1-D views.
EMA and checkpoints work on fragments, and so don't depend on the ZeRO stage or on how it partitions. The DeepSpeed
internals used here were checked against DeepSpeed 0.19; `_check_fragments` verifies them at every start.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import Tensor, nn

from sora_train.config.schema import Config, Precision
from sora_train.core.cli import InputError
from sora_train.core.world import World
from sora_train.training.engine.collectives import Buckets, norm_of, spare
from sora_train.training.engine.muon import Flat, MatrixOptimizer, Piece, Sharing

MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam; Muon has the first
_TIMEOUT = timedelta(days=1)  # the watch sees hangs much sooner; all ranks may be suspended for long


@dataclass(frozen=True)
class Fragment:
    """This rank's part of one flattened parameter: elements start .. start + numel."""

    name: str  # NETWORK/PARAMETER
    start: int
    master: Tensor  # fp32 master weights, 1-D
    states: dict[str, Tensor]  # optimizer state by name (exp_avg, exp_avg_sq), 1-D


def connect(world: World, rehearsal: bool = False) -> torch.device:
    """Join the process group (gloo on CPUs, nccl and gloo on GPUs) and return this rank's device.

    In a rehearsal (for forecasts) the other ranks of `world` don't exist: collectives return at once and change
    nothing.
    """
    cuda = torch.cuda.is_available()
    if cuda:
        if world.local_rank >= torch.cuda.device_count():
            raise InputError(
                f"rank {world.rank} has no GPU of its own: {world.local_size} ranks on this machine, "
                f"{torch.cuda.device_count()} GPU(s) for them; start fewer with --nproc-per-node"
            )
        torch.cuda.set_device(world.local_rank)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed requires it
    if rehearsal:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", store=FakeStore(), rank=world.rank, world_size=world.size)
    elif world.launched:
        dist.init_process_group(backend, timeout=_TIMEOUT)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=_TIMEOUT)
    deepspeed.init_distributed(dist_backend="nccl" if cuda else "gloo", verbose=False)
    return torch.device("cuda", world.local_rank) if cuda else torch.device("cpu")


def disconnect() -> None:
    """Leave the process group, so that another run can follow in this process."""
    deepspeed.comm.destroy_process_group()  # torch's function would leave DeepSpeed with references to destroyed groups


@dataclass
class Pace:
    """Parameters of an optimizer step; the same for every engine of a run."""

    weight: float = 1.0  # loss weight over all ranks, by which summed losses are divided
    lr_factor: float = 1.0  # factor on the learning rate of every parameter group
    before_update: Callable[[], None] = lambda: None  # called before the weights change


class OnItsWay:
    """A number that is copied from the device asynchronously.

    Reading it waits for work that was queued on the device before the copy, but not for work queued later.
    """

    def __init__(self, value: Tensor) -> None:
        self._value = value.detach().to("cpu", non_blocking=True)  # into page-locked memory
        self._arrived = torch.cuda.Event() if value.is_cuda else None
        if self._arrived is not None:
            self._arrived.record()

    def read(self) -> float:
        """Wait for the copy and return the number."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return float(self._value.item())


class Engine:
    """A network under ZeRO. A step is `passes` times a forward call and `backward`, then `step`.

    `loss` is this rank's share of the last step's loss.

    Args:
        name: Name of the network, the prefix of its parameters' names.
        network: The network.
        optimizer: AdamW over its trained parameters.
        passes: Backward passes per step.
        config: Configuration of the run.
        whole: Check that the ranks together hold every parameter; see `Engines`.
    """

    def __init__(
        self, name: str, network: nn.Module, optimizer: torch.optim.AdamW, passes: int, config: Config,
        whole: bool = True,
    ) -> None:  # fmt: skip
        options, precision = config.deepspeed, config.precision
        self.pace, self.loss = Pace(), OnItsWay(torch.zeros(()))
        self.stage = int(options.get("zero_optimization", {}).get("stage", 0))
        self.passes, self._done = passes, 0
        self.clip, self.optimizer, self.fp32 = config.optim.clip, optimizer, precision is Precision.fp32
        clip = self.clip
        self.world = dist.get_world_size()
        self.names: dict[Any, str] = {p: f"{name}/{key}" for key, p in network.named_parameters() if p.requires_grad}
        self.shapes = {name: tuple(p.shape) for p, name in self.names.items()}
        settings = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": passes,
            "gradient_clipping": 0.0 if self.stage == 0 and self.fp32 else clip,  # see _step_fp32
            "steps_per_print": 1 << 62,
            "bf16": {"enabled": not self.fp32},
            "zero_force_ds_cpu_optimizer": False,
            "zero_allow_untested_optimizer": True,
            **options,
        }
        self.module = network
        groups = optimizer.param_groups
        self._matrices = {self.names[p] for group in groups if group.get("muon") for p in group["params"]}
        try:
            self.engine, *_ = deepspeed.initialize(
                model=network, optimizer=optimizer, config=settings, dist_init_required=False
            )
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise InputError(f"deepspeed: {where}={first['input']}: {first['msg']} ({error.title})") from error
        self._grad_norm: Tensor | float | None = 0.0
        self._buckets: Buckets | None = None
        if self.stage == 0 and self.fp32 and self.world > 1:
            self._buckets, self.engine.enable_backward_allreduce = Buckets(self.names), False
        spare(self.engine.optimizer)
        self._create_moments()
        self.fragments = sorted(self._fragments(), key=lambda f: f.name)
        self._check_fragments(whole)
        if isinstance(optimizer, MatrixOptimizer):
            optimizer.orthogonal = Sharing(self._flats(), whole=self.stage == 0)
        self._own_loss = torch.zeros((), dtype=torch.float64, device=next(iter(self.names)).device)

    def __call__(self, *arguments: Any) -> Any:
        return self.engine(*arguments)

    def backward(self, loss_sum: Tensor) -> None:
        """Back-propagate a pack's summed loss, scaled so that all ranks and passes add up to the step's mean loss.

        A non-finite loss makes all gradients NaN, even if they would be finite, so that `step` is skipped.
        """
        weight = self.pace.weight
        self._own_loss += loss_sum.detach() / weight
        averaged = 1 if self._buckets else self.world  # DeepSpeed divides the sum over ranks, buckets don't
        scale = torch.where(torch.isfinite(loss_sum.detach()), averaged / weight, float("nan"))
        self._done += 1
        if self._buckets and self._done == self.passes:
            self._buckets.open()
        self.engine.backward(loss_sum * scale, scale_wrt_gas=False)
        if self._done < self.passes:
            self.engine.step()  # at an accumulation boundary that isn't the last, DeepSpeed only counts the pass

    def step(self) -> bool:
        """Clip gradients, update the weights and clear the gradients.

        Returns:
            False if a gradient was non-finite and the update was skipped; the same on all ranks.
        """
        self._done = 0
        self.pace.before_update()
        self.loss = OnItsWay(self._own_loss)  # queued before DeepSpeed's own wait for the gradient norm
        self._own_loss = torch.zeros_like(self._own_loss)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * self.pace.lr_factor
        if self.stage == 0 and self.fp32:
            return self._step_fp32()
        self.engine.step()
        self._grad_norm = self.engine.get_global_grad_norm()  # may be a device tensor; it is read only for logging
        return bool(self.engine.was_step_applied())

    def _step_fp32(self) -> bool:
        """Step of stage 0 in fp32, for which DeepSpeed neither checks for NaN nor keeps the gradient norm."""
        gradients = self._buckets.close() if self._buckets else [p.grad for p in self.names if p.grad is not None]
        norm = norm_of(gradients).sqrt()
        self._grad_norm = known = float(norm)  # the only synchronisation with the device in such a step
        finite = known < float("inf")  # False for NaN too
        if finite:
            if (factor := self.clip / (known + 1e-6)) < 1.0:  # as in torch's clip_grad_norm_
                torch._foreach_mul_(gradients, factor)
        else:
            for p in self.names:
                p.grad = None
        self.engine.step()
        return finite

    def fingerprint(self) -> Tensor:
        """Checksums of the weights, two integers per parameter, for comparing ranks.

        Empty under ZeRO-3, where ranks hold different parts of the weights.
        """
        sums = []
        for p in self.names if self.stage < 3 else ():
            bits = p.data.view(torch.int32 if p.element_size() == 4 else torch.int16).to(torch.int64)
            sums += [bits.sum(), (bits * bits).sum()]
        return torch.stack(sums).cpu() if sums else torch.zeros(0, dtype=torch.int64)

    @property
    def grad_norm(self) -> float:
        """Global gradient norm of the last step before clipping; 0 if there is none. Waits for the device."""
        return 0.0 if self._grad_norm is None else float(self._grad_norm)

    @property
    def lr(self) -> float:
        """Learning rate of the first parameter group."""
        return float(self.optimizer.param_groups[0]["lr"])

    def set_optimizer_steps(self, count: int) -> None:
        """Set Adam's step counter, after a load."""
        for state in self._inner.state.values():
            state["step"] = torch.full_like(torch.as_tensor(state["step"]), count)

    @contextmanager
    def weights(self, values: dict[str, Tensor]) -> Iterator[None]:
        """Context in which the network has other weights (EMA), given by fragment name. Collective."""
        shared = self.stage in (0, 3) and self.fp32  # the forward pass uses the master weights themselves
        kept = {f.name: f.master.clone() if shared else f.master for f in self.fragments}
        self.write_weights(values)
        try:
            yield
        finally:
            self.write_weights(kept)

    @torch.no_grad()
    def write_weights(self, values: dict[str, Tensor]) -> None:
        """Set the weights of the forward pass from one fp32 tensor per fragment. Collective."""
        mine = {f.name: f for f in self.fragments}
        if self.stage == 3:
            self._write_partitions(values)
            return
        for p, name in self.names.items():
            if self.stage == 0:
                p.data.copy_(values[name].view_as(p))
                continue
            full = torch.zeros(p.numel(), device=p.device)
            if name in mine:
                full[mine[name].start : mine[name].start + values[name].numel()] = values[name]
            dist.all_reduce(full)
            p.data.copy_(full.view_as(p))

    def _write_partitions(self, values: dict[str, Tensor]) -> None:
        z = self.engine.optimizer
        z.checkpoint_event_prologue()  # releases gathered parameters
        for p, name in self.names.items():
            if name in values:
                p.ds_tensor.data[: values[name].numel()].copy_(values[name])
        z.checkpoint_event_epilogue()  # gathers small parameters again, which stay gathered between steps

    @property
    def _inner(self) -> torch.optim.Optimizer:
        z = self.engine.optimizer
        return z if z is self.optimizer else z.optimizer

    def _create_moments(self) -> None:
        """Create Adam's state before the first step, so that a checkpoint can be loaded into it.

        At stage 0 in bf16, DeepSpeed creates it by a step with zero gradients. That step decays the weights and counts
        in Adam's bias correction (which makes the first updates up to a quarter too small), so its effects are undone.
        """
        z, inner = self.engine.optimizer, self._inner
        for parameter in self.names if self.stage == 0 and not self.fp32 else ():
            self._master_of(parameter).data.copy_(parameter.data)
        for p, parameters in self._masters():
            moments = self._moments(parameters[0])
            zeros = {moment: torch.zeros_like(p.data, dtype=torch.float32) for moment in moments}
            inner.state[p] |= {"step": torch.zeros((), dtype=torch.float32, device=p.device), **zeros}
        if self.stage in (1, 2) and hasattr(z, "_lazy_init_hp_params_optimizer_state"):
            z._lazy_init_hp_params_optimizer_state()

    def _masters(self) -> list[tuple[Tensor, list[nn.Parameter]]]:
        """The tensors that the optimizer itself works on, each with the parameters of which it holds pieces."""
        z = self.engine.optimizer
        if self.stage == 3:  # its groups stand empty between steps
            return list(zip(z.fp32_partitioned_groups_flat, z.fp16_groups, strict=True))
        if self.stage in (1, 2):
            groups = getattr(z, "bit16_groups", None) or z.bf16_groups
            return list(zip(self._partitions(), groups, strict=True))
        return [(p if self.fp32 else self._master_of(p), [p]) for p in self.names]

    def _partitions(self) -> list[Tensor]:
        """This rank's part of each group's fp32 masters, at stages 1 and 2."""
        z = self.engine.optimizer
        return getattr(z, "single_partition_of_fp32_groups", None) or z.fp32_groups_flat_partition

    def _moments(self, parameter: nn.Parameter) -> tuple[str, ...]:
        """The states that the optimizer keeps of a parameter: Muon has no second moment."""
        return MOMENTS[:1] if self.names[parameter] in self._matrices else MOMENTS

    def _flats(self) -> dict[int, Flat]:
        """Locations of the pieces of matrices that Muon updates, by the id of the tensor that holds them."""
        mine = {f.name: f for f in self.fragments}
        found = {}
        for flat, parameters in self._masters():
            names = [self.names[p] for p in parameters]
            if names[0] not in self._matrices:
                continue
            pieces = [
                Piece(number, mine[name].start, self._place(mine[name].master, flat), mine[name].master.numel())
                for number, name in enumerate(names)
                if name in mine
            ]
            shapes = tuple((shape[0], math.prod(shape[1:])) for shape in map(self.shapes.__getitem__, names))
            found[id(flat)] = Flat(shapes, tuple(pieces))
        return found

    @staticmethod
    def _place(part: Tensor, flat: Tensor) -> int:
        """The element of a flat tensor at which a view of it begins."""
        return (part.data_ptr() - flat.data_ptr()) // flat.element_size()

    def _fragments(self) -> Iterator[Fragment]:
        for p, name in self.names.items():
            if self.stage == 3:
                yield from self._partition_fragment(p, name)
            elif self.stage in (1, 2):
                yield from self._flat_fragment(p, name)
            else:
                master = p if self.fp32 else self._master_of(p)
                state = self._inner.state[master]
                yield Fragment(name, 0, master.data.view(-1), {m: state[m].view(-1) for m in self._moments(p)})

    def _master_of(self, p: nn.Parameter) -> Tensor:
        """The fp32 copy of a bf16 parameter at stage 0."""
        z = self.engine.optimizer
        for low, high in zip(z.fp16_groups, z.fp32_groups, strict=True):
            for mine, master in zip(low, high, strict=True):
                if mine is p:
                    return master
        raise RuntimeError(f"DeepSpeed keeps no fp32 copy of {self.names[p]}")

    def _flat_fragment(self, p: Any, name: str) -> Iterator[Fragment]:
        place = p._hp_mapping
        if place is None:  # another rank's
            return
        flat, at = self._partitions()[place.param_group_index], place.hp_fragment_address
        state, moments = self._inner.state[flat], self._moments(p)
        master, *states = (t.data.narrow(0, at.start, at.numel) for t in (flat, *(state[m] for m in moments)))
        yield Fragment(name, place.lp_fragment_address.start, master, dict(zip(moments, states, strict=True)))

    def _partition_fragment(self, p: Any, name: str) -> Iterator[Fragment]:
        z = self.engine.optimizer
        start = p.partition_numel() * dist.get_rank()
        numel = min(p.partition_numel(), p.ds_numel - start)  # the rest of the last partition is padding
        if numel <= 0:
            return
        master, *states = (
            z._get_fp32_opt_state_partition(p, release_swap_buffers=True, optim_state_key=key)[0].data[:numel]
            for key in (None, *self._moments(p))
        )
        yield Fragment(name, start, master, dict(zip(self._moments(p), states, strict=True)))

    def _check_fragments(self, whole: bool) -> None:
        """Check that master weights equal their parts of the parameters, and, with `whole`, that they cover all.

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
                    f"DeepSpeed {deepspeed.__version__} keeps the master weights of {f.name} elsewhere than expected; "
                    "remove unusual keys under deepspeed.zero_optimization, or use DeepSpeed 0.19"
                )
            covered[order[f.name]] += f.master.numel() if self.stage or dist.get_rank() == 0 else 0
        if not whole:
            return
        dist.all_reduce(covered)
        sizes = torch.tensor([torch.Size(self.shapes[name]).numel() for name in order])
        if not torch.equal(covered, sizes):
            raise InputError(
                f"DeepSpeed {deepspeed.__version__}: the optimizer state doesn't cover every parameter once"
            )
