"""Replacements for some of DeepSpeed's collectives of a step, with fewer or earlier communication.

Without ZeRO, in fp32, gradients are summed bucket by bucket while the backward pass still runs. The optimizer reads
them from the buckets, which saves a copy and the pass that would divide them.

At ZeRO 1 and 2, DeepSpeed waits for one all-reduce of the norm and one all-gather of weights per parameter group. In
bf16 it also searches for non-finite gradients beforehand, although the norm shows them too. Here one all-reduce
computes the norm, and the all-gathers of all groups run concurrently. Checked against DeepSpeed 0.19.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.zero import stage_1_and_2
from torch import Tensor, nn

from sora_train.config.deepspeed_keys import BUCKET


class Buckets:
    """Buckets: flat tensors in which the gradients of a network are summed over the ranks.

    The all-reduce of a bucket starts as soon as the backward pass has computed all of its gradients. Buckets are sent
    in the same order on every rank. From then on, the `.grad` of a parameter is a view of its bucket.

    Args:
        parameters: The trained parameters, in the order of the forward pass.
        limit: Most bytes of a bucket; a larger parameter has a bucket of its own.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], limit: int = BUCKET) -> None:
        self._buckets: list[list[nn.Parameter]] = []
        size = limit
        for p in reversed(list(parameters)):
            if size + p.nbytes > limit:
                self._buckets.append([])
                size = 0
            self._buckets[-1].append(p)
            size += p.nbytes
        self._place = {p: number for number, bucket in enumerate(self._buckets) for p in bucket}
        self._missing: list[int] = []  # gradients that each bucket still waits for; empty outside the last pass
        self._sent: list[tuple[Tensor, Any]] = []
        for p in self._place:
            p.register_post_accumulate_grad_hook(self._arrived)

    def open(self) -> None:
        """Enable sending; called before the last backward pass of a step."""
        self._missing = [len(bucket) for bucket in self._buckets]

    def close(self) -> list[Tensor]:
        """Send the remaining buckets, wait for all sums, and return the buckets as flat tensors."""
        while len(self._sent) < len(self._buckets):
            self._send()
        for _, work in self._sent:
            work.wait()
        flats = [flat for flat, _ in self._sent]
        self._missing, self._sent = [], []
        return flats

    def _arrived(self, p: nn.Parameter) -> None:
        if not self._missing:
            return
        self._missing[self._place[p]] -= 1
        while len(self._sent) < len(self._buckets) and not self._missing[len(self._sent)]:
            self._send()

    def _send(self) -> None:
        bucket = self._buckets[len(self._sent)]
        flat = torch.cat([torch.zeros_like(p).view(-1) if p.grad is None else p.grad.view(-1) for p in bucket])
        for p, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
            p.grad = part.view_as(p)
        self._sent.append((flat, dist.all_reduce(flat, async_op=True)))


def squared_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Squared L2 norm of all tensors together, a scalar in fp64."""
    norms = torch._foreach_norm(list(tensors), 2, dtype=torch.float32)
    return torch.stack(norms).double().square().sum()


def spare(optimizer: Any) -> None:
    """Replace norm, overflow check and all-gathers of DeepSpeed's ZeRO-1/2 optimizer; others are left unchanged."""
    if not isinstance(optimizer, stage_1_and_2.DeepSpeedZeroOptimizer) or optimizer.cpu_offload:
        return
    optimizer.check_overflow = lambda partition_gradients=True: None
    optimizer.scaled_global_norm = partial(_scaled_global_norm, optimizer)
    stage_1_and_2.all_gather_dp_groups = _all_gather_groups


def _scaled_global_norm(optimizer: Any, norm_type: int = 2) -> Tensor:
    """Global gradient norm; infinite if a gradient isn't finite."""
    mine = [g for i in range(len(optimizer.bit16_groups)) for g in optimizer.averaged_gradients[i]]
    squares = squared_norm(mine) if mine else torch.zeros((), dtype=torch.float64, device=optimizer.device)
    dist.all_reduce(squares, group=optimizer.dp_process_group)
    norm = squares.sqrt().float()
    return torch.where(torch.isfinite(norm), norm, float("inf"))


def _all_gather_groups(
    groups_flat: Sequence[Tensor], partitioned_param_groups: Sequence[Sequence[Tensor]],
    dp_process_group: Sequence[Any], **sizes: int,
) -> None:  # fmt: skip
    """Gather the weights of all parameter groups, each from the partitions of all ranks."""
    under_way = []
    for flat, partitions, group in zip(groups_flat, partitioned_param_groups, dp_process_group, strict=True):
        if dist.get_world_size(group) > 1:
            mine = partitions[dist.get_rank(group)]
            under_way.append(dist.all_gather_into_tensor(flat, mine, group=group, async_op=True))
    for work in under_way:
        work.wait()
