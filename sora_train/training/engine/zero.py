"""DeepSpeed ZeRO behind one class, with the same interface to training and optimizer state at every stage.

Only `fragments` depends on how DeepSpeed partitions that state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import Tensor, nn

from sora_train.config.schema import Config, Precision
from sora_train.core.cli import InputError
from sora_train.training.engine.collectives import Buckets, spare, squared_norm
from sora_train.training.engine.fragments import Partition, Trained
from sora_train.training.engine.muon import MatrixOptimizer, Sharing


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
        whole: Check that the master weights of all ranks together cover every parameter; see `Engines`.
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
        trained = Trained.of(name, network, optimizer)
        self.names, self.shapes = trained.names, trained.shapes
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
        self.partition = Partition(self.engine.optimizer, optimizer, trained, self.stage, self.fp32)
        self.partition.check(whole)
        self.fragments = self.partition.fragments
        if isinstance(optimizer, MatrixOptimizer):
            optimizer.orthogonal = Sharing(self.partition.flats(), whole=self.stage == 0)
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
        norm = squared_norm(gradients).sqrt()
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
        for state in self.partition.inner.state.values():
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
