"""Ulysses sequence parallelism over packs (Jacobs et al. 2023, DeepSpeed-Ulysses, arXiv 2309.14509), from outside.

The ranks of a sequence-parallel group hold the same pack, each its own part of the tokens. Around self-attention they
trade tokens for heads: every rank attends with all tokens of a few heads, then they trade back. All else works token by
token, cross-attention too, since every rank has the captions. The model isn't changed: two hooks share out what goes in
and gather what comes out, and the attention function is replaced.

Every rank of a group decodes and encodes the clips itself, and they only agree on which ones failed (`same_clips`).
Every rank sees the whole velocity and computes the whole loss. To the trainer and DeepSpeed they are ordinary ranks:
sums of loss and of loss weight both count a pack once per rank of its group, which leaves their ratio, and the gradient
of the ratio, as they are on one rank.
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
Group = dist.ProcessGroup | None  # None: a rank by itself


def sequence_group(world: World) -> Group:
    """The process group of this rank's neighbours in the sequence; all ranks of the job together."""
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
    """The ranks that share a pack, this one among them."""

    def __init__(self, group: Group) -> None:
        self.group, self.place, self.parts = group, dist.get_rank(group), dist.get_world_size(group)

    def exchange(self, x: Tensor) -> Tensor:
        """Send `x[i]` to rank i of the group; the result holds at i what rank i sent here."""
        received = torch.empty_like(x)
        dist.all_to_all_single(received, x, group=self.group)
        return received

    def gather(self, part: Tensor) -> Tensor:
        """The parts of all ranks end to end."""
        whole = [torch.empty_like(part) for _ in range(self.parts)]
        dist.all_gather(whole, part, group=self.group)
        return torch.cat(whole)


class Imagined(Neighbours):
    """For planning: shapes and memory are those of a rank among its neighbours; nothing is sent, but counted."""

    def __init__(self, parts: int) -> None:
        self.place, self.parts, self.sent = 0, parts, 0  # bytes, those that a rank sends to itself among them

    def exchange(self, x: Tensor) -> Tensor:
        """Something of the shape of what would arrive."""
        self.sent += x.numel() * x.element_size()
        return torch.empty_like(x)

    def gather(self, part: Tensor) -> Tensor:
        """Something of the shape of the whole."""
        self.sent += self.parts * part.numel() * part.element_size()
        return torch.cat([torch.empty_like(part) for _ in range(self.parts)])


def same_clips(steps: Iterable[Any], group: Group) -> Iterator[Any]:
    """Steps of a loader, without the clips that failed on any rank of the group: a time-out may strike one of them."""
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
    """Share out the tokens of every pack that `network` is called with. Each of `self_attentions` has an `attend`."""

    def share_out(_: nn.Module, arguments: tuple[LatentPack]) -> tuple[LatentPack]:
        return (part_of(arguments[0], others.place, others.parts),)

    def bring_together(_: nn.Module, arguments: tuple[LatentPack], velocity_NP: Tensor) -> Tensor:
        layout = arguments[0].video.layout
        return _Gather.apply(velocity_NP, others)[: sum(layout.spans)]  # without what pads the pack

    network.register_forward_pre_hook(share_out)
    network.register_forward_hook(bring_together)
    for attention in self_attentions:
        attention.attend = across(attention.attend, others)


def part_of(pack: LatentPack, place: int, parts: int) -> LatentPack:
    """One of several equal parts of a pack. Where they don't divide, a clip without a caption pads it at the end."""
    video = pack.video
    layout = video.layout
    padding = -layout.tokens % parts
    grids = (*layout.grids, (1, 1, padding)) if padding else layout.grids
    layout = replace(layout, grids=grids, part=(place, parts))
    x_NP = F.pad(video.x_NP, (0, 0, 0, padding))[layout.mine]
    t_of_N = F.pad(video.t_of_N, (0, padding))[layout.mine]
    return replace(pack, streams={"video": replace(video, layout=layout, x_NP=x_NP, t_of_N=t_of_N)})


def across(attend: Attend, others: Neighbours) -> Attend:
    """Attention over the tokens of all ranks of a group, from each rank's part of them to the same part."""
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
    """All-to-all over the first dimension, which is its own transpose."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, others: Neighbours) -> Tensor:
        ctx.others = others
        return others.exchange(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.others.exchange(grad.contiguous()), None


class _Gather(torch.autograd.Function):
    """The parts of all ranks end to end; backwards every rank gets the sum of all ranks' gradients of its part."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, others: Neighbours) -> Tensor:
        ctx.others = others
        return others.gather(part.contiguous())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        parts = grad.unflatten(0, (ctx.others.parts, -1))
        return ctx.others.exchange(parts.contiguous()).sum(0), None
