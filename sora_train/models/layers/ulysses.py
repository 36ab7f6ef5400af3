"""Ulysses sequence parallelism over packs (Jacobs et al. 2023, DeepSpeed-Ulysses, arXiv 2309.14509).

The ranks of a sequence-parallel group work on the same pack, each on an equal part of its tokens. Around self-attention
an all-to-all exchanges tokens for heads: each rank attends over all tokens with a share of the heads, and a second one
reverses the exchange. Everything else works token by token; so does cross-attention, since every rank has all captions.
The model's code is not changed: two hooks split its inputs and gather its output, and its attention function is
replaced.

Every rank of a group decodes and encodes the clips itself; they only agree on which clips failed (`same_clips`). Every
rank has the whole velocity and computes the whole loss. For the trainer and DeepSpeed they are ordinary data-parallel
ranks: the sums of loss and of loss weight both count a pack once per rank of its group, so their ratio, and its
gradient, are the same as on one rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from sora_train.core.batch import LatentPack
from sora_train.core.world import World

Attend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
Group = dist.ProcessGroup | None  # None: no sequence parallelism


def sequence_group(world: World) -> Group:
    """Create the sequence-parallel process groups and return this rank's. Collective: all ranks must call it."""
    mine = None
    if world.sequence == 1:
        return mine
    for first in range(0, world.size, world.sequence):
        ranks = list(range(first, first + world.sequence))
        group = dist.new_group(ranks)
        if world.rank in ranks:
            mine = group
    return mine


class Neighbours:
    """The ranks that share a pack, and their collectives. `place` is this rank's index, `parts` the number of ranks."""

    def __init__(self, group: Group) -> None:
        self.group, self.place, self.parts = group, dist.get_rank(group), dist.get_world_size(group)

    def exchange(self, x: Tensor) -> Tensor:
        """All-to-all: send `x[i]` to rank i of the group; element i of the result was received from rank i."""
        received = torch.empty_like(x)
        dist.all_to_all_single(received, x, group=self.group)
        return received

    def gather(self, part: Tensor) -> Tensor:
        """All-gather: the parts of all ranks, concatenated along the first dimension."""
        whole = [torch.empty_like(part) for _ in range(self.parts)]
        dist.all_gather(whole, part, group=self.group)
        return torch.cat(whole)


class Imagined(Neighbours):
    """Stand-in for forecasts: results have the real shapes, but nothing is sent; the bytes are counted in `sent`."""

    def __init__(self, parts: int) -> None:
        self.place, self.parts, self.sent = 0, parts, 0  # bytes, including those that a rank sends to itself

    def exchange(self, x: Tensor) -> Tensor:
        """Uninitialised tensor in the shape of the received one."""
        self.sent += x.numel() * x.element_size()
        return torch.empty_like(x)

    def gather(self, part: Tensor) -> Tensor:
        """Uninitialised tensor in the shape of the gathered one."""
        self.sent += self.parts * part.numel() * part.element_size()
        return torch.cat([torch.empty_like(part) for _ in range(self.parts)])


def same_clips(steps: Iterable[Any], group: Group) -> Iterator[Any]:
    """Yield the steps of a loader without the clips that failed on any rank of the group.

    The ranks decode separately, so a failure such as a time-out may hit only some of them.
    """
    for step in steps:
        if group is not None:
            refusals: list[Any] = [None] * dist.get_world_size(group)
            dist.all_gather_object(refusals, [pack.refused for pack in step.packs], group=group)
            for pack, *refused in zip(step.packs, *refusals, strict=True):
                by_sample = {r.sample: r for rank in refused for r in rank}
                pack.clips = [clip for clip in pack.clips if clip.visit.sample not in by_sample]
                pack.refused = list(by_sample.values())
        yield step


def apply(network: nn.Module, self_attentions: Sequence[Any], others: Neighbours) -> None:
    """Make `network` sequence parallel: split its input packs, gather its output, and wrap each `attend` function.

    Args:
        network: Maps a `LatentPack` to one row per token.
        self_attentions: Its self-attention modules, each with an attribute `attend`.
        others: The ranks that share the tokens.
    """

    def share_out(_: nn.Module, arguments: tuple[LatentPack]) -> tuple[LatentPack]:
        return (part_of(arguments[0], others.place, others.parts),)

    def bring_together(_: nn.Module, arguments: tuple[LatentPack], velocity_NP: Tensor) -> Tensor:
        layout = arguments[0].video.layout
        return _Gather.apply(velocity_NP, others)[: sum(layout.spans)]  # without padding

    network.register_forward_pre_hook(share_out)
    network.register_forward_hook(bring_together)
    for attention in self_attentions:
        attention.attend = across(attention.attend, others)


def part_of(pack: LatentPack, place: int, parts: int) -> LatentPack:
    """Take part `place` of `parts` equal parts of a pack's tokens.

    If they don't divide the tokens, the pack is padded at its end, by a clip without a caption.
    """
    video = pack.video
    layout = video.layout
    padding = -layout.tokens % parts
    grids = (*layout.grids, (1, 1, padding)) if padding else layout.grids
    layout = replace(layout, grids=grids, part=(place, parts))
    x_NP = F.pad(video.x_NP, (0, 0, 0, padding))[layout.mine]
    t_of_N = F.pad(video.t_of_N, (0, padding))[layout.mine]
    return replace(pack, streams={"video": replace(video, layout=layout, x_NP=x_NP, t_of_N=t_of_N)})


def across(attend: Attend, others: Neighbours) -> Attend:
    """Wrap an attention function: takes and returns a rank's part of the tokens, attends over those of all ranks."""
    parts = others.parts

    @torch.compiler.disable
    def attend_across(q: Tensor, k: Tensor, v: Tensor, q_lengths: Tensor, k_lengths: Tensor) -> Tensor:
        heads = torch.stack((q, k, v)).unflatten(2, (parts, -1))  # 3 n P K/P d
        heads = _Exchange.apply(heads.permute(2, 0, 1, 3, 4).contiguous(), others)  # P 3 n K/P d
        q, k, v = heads.permute(1, 0, 2, 3, 4).flatten(1, 2)  # all tokens, a part of the heads
        out = attend(q, k, v, q_lengths, k_lengths).unflatten(0, (parts, -1))
        return _Exchange.apply(out.contiguous(), others).transpose(0, 1).flatten(1, 2)

    return attend_across


class _Exchange(torch.autograd.Function):
    """Differentiable all-to-all over the first dimension; its adjoint is itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, others: Neighbours) -> Tensor:
        ctx.others = others
        return others.exchange(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.others.exchange(grad.contiguous()), None


class _Gather(torch.autograd.Function):
    """Differentiable all-gather; in backward every rank gets the sum of all ranks' gradients of its part."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, others: Neighbours) -> Tensor:
        ctx.others = others
        return others.gather(part.contiguous())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        parts = grad.unflatten(0, (ctx.others.parts, -1))
        return ctx.others.exchange(parts.contiguous()).sum(0), None
