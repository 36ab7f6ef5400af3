"""Ulysses sequence parallelism over packs (Jacobs et al. 2023, DeepSpeed-Ulysses, arXiv 2309.14509).

The ranks of a sequence-parallel group work on the same pack, each on an equal part of its tokens. Around self-attention
an all-to-all exchanges tokens for heads: each rank attends over all tokens with a share of the heads, and a second one
reverses the exchange. If the ranks don't divide the heads, heads of zeros are added. All other layers work token by
token, including cross-attention, since every rank has all captions. The model's code is not changed: two hooks split
its inputs and gather its output, and its attention function is replaced.

The number of ranks that share a pack is the same for all packs (`parallel.sequence`), or the plan sets it for each pack
(`data.pack_slots`). In the second case, groups of different sizes run at the same time. This can't deadlock: the ranks
of a group run the same operations in the same order, and different groups share only collectives of all ranks.

Every rank of a group decodes and encodes the clips itself; the ranks only agree on which clips failed (`same_clips`).
Each of the n ranks has the complete velocity, computes the complete loss, and counts an n-th of it. The sums over all
ranks, and the gradient, are therefore those of one rank that computes the pack alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from sora_train.core.batch import LatentPack
from sora_train.core.world import World

Attend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


class Neighbours:
    """The ranks that share a pack, and their collectives. `place` is this rank's index, `parts` the number of ranks."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
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


class Groups:
    """The groups of ranks in which this rank shares packs, by group size; `now` is that of the current pack.

    Args:
        neighbours: Group by its size (2 or more ranks, this one included).
        fixed: Number of ranks that share every pack; 1 if `LatentPack.ranks` sets it for each pack.
    """

    def __init__(self, neighbours: Mapping[int, Neighbours], fixed: int = 1) -> None:
        self.neighbours, self.fixed = neighbours, fixed
        self.now: Neighbours | None = None

    @property
    def most(self) -> Neighbours | None:
        """The largest group. None if no pack is shared."""
        return self.neighbours[max(self.neighbours)] if self.neighbours else None

    def enter(self, ranks: int | None) -> Neighbours | None:
        """Select the group for a pack, as `now`.

        Args:
            ranks: Number of ranks that share the pack; None: `fixed`.

        Returns:
            The group, or None if this rank computes the pack alone.
        """
        self.now = self.neighbours[ranks or self.fixed] if (ranks or self.fixed) > 1 else None
        return self.now


def sequence_groups(world: World, most: int = 1) -> Groups:
    """Create the process groups in which ranks share packs. Collective: all ranks must call it.

    With `parallel.sequence` above 1, all groups have that size. Otherwise there are groups of 2, 4, ... ranks, up to
    the number that can share a pack of `most` slots.
    """
    sizes = [world.sequence] if world.sequence > 1 else [1 << n for n in range(1, world.sharing(most).bit_length())]
    mine = {}
    for size in sizes:  # in the same order on every rank, as only the members of a group wait for one another
        first = world.rank // size * size
        group = dist.new_group(list(range(first, first + size)), use_local_synchronization=True)
        mine[size] = Neighbours(group)
    return Groups(mine, world.sequence)


class Imagined(Neighbours):
    """Stand-in for forecasts: results have the real shapes, but no data is sent; bytes are counted in `sent`."""

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


def same_clips(steps: Iterable[Any], groups: Groups | None) -> Iterator[Any]:
    """Yield the steps of a loader without the clips that failed on any rank that shares their pack.

    The ranks decode separately, so a failure such as a time-out may hit only some of them. Costs one collective a step.
    """
    others = groups.most if groups else None
    for step in steps:
        if groups is not None and others is not None:
            # first rank of the group of each pass's pack; 0 for all with a fixed size, as all these ranks share a pack
            firsts = [0 if groups.fixed > 1 else others.place - pack.part[0] for pack in step.packs]
            told: list[Any] = [None] * others.parts
            mine = [(first, pack.refused) for first, pack in zip(firsts, step.packs, strict=True)]
            dist.all_gather_object(told, mine, group=others.group)
            for pack, mine_first, *ranks in zip(step.packs, firsts, *told, strict=True):
                by_sample = {r.sample: r for first, refused in ranks if first == mine_first for r in refused}
                pack.clips = [clip for clip in pack.clips if clip.visit.sample not in by_sample]
                pack.refused = list(by_sample.values())
        yield step


def apply(network: nn.Module, self_attentions: Sequence[Any], groups: Groups) -> None:
    """Make `network` sequence parallel: split its input packs, gather its output, and wrap each `attend` function.

    Args:
        network: Maps a `LatentPack` to one row per token.
        self_attentions: Its self-attention modules, each with an attribute `attend`.
        groups: The groups of ranks that share the tokens.
    """

    def share_out(_: nn.Module, arguments: tuple[LatentPack]) -> tuple[LatentPack]:
        others = groups.enter(arguments[0].ranks)
        return arguments if others is None else (part_of(arguments[0], others.place, others.parts),)

    def bring_together(_: nn.Module, arguments: tuple[LatentPack], velocity_NP: Tensor) -> Tensor:
        if groups.now is None:
            return velocity_NP
        layout = arguments[0].video.layout
        return _Gather.apply(velocity_NP, groups.now)[: sum(layout.spans)]  # without padding

    network.register_forward_pre_hook(share_out)
    network.register_forward_hook(bring_together)
    for attention in self_attentions:
        attention.attend = across(attention.attend, groups)


def part_of(pack: LatentPack, place: int, parts: int) -> LatentPack:
    """Select part number `place` of `parts` equal parts of a pack's tokens.

    If the number of tokens isn't divisible, the pack is padded at its end by a clip without a caption.
    """
    video = pack.video
    layout = video.layout
    padding = -layout.tokens % parts
    grids = (*layout.grids, (1, 1, padding)) if padding else layout.grids
    layout = replace(layout, grids=grids, part=(place, parts))
    x_NP = F.pad(video.x_NP, (0, 0, 0, padding))[layout.mine]
    t_of_N = F.pad(video.t_of_N, (0, padding))[layout.mine]
    return replace(pack, streams={"video": replace(video, layout=layout, x_NP=x_NP, t_of_N=t_of_N)})


def across(attend: Attend, groups: Groups) -> Attend:
    """Wrap an attention function, so that it attends over the tokens of all ranks of the group.

    The wrapped function takes and returns this rank's part of the tokens.
    """

    @torch.compiler.disable
    def attend_across(q: Tensor, k: Tensor, v: Tensor, q_lengths: Tensor, k_lengths: Tensor) -> Tensor:
        """Attend over the tokens of all ranks; each rank computes its share of the heads."""
        others, heads = groups.now, q.shape[1]
        if others is None:
            return attend(q, k, v, q_lengths, k_lengths)
        parts = others.parts
        whole = torch.stack((q, k, v))
        if heads % parts:
            whole = F.pad(whole, (0, 0, 0, -heads % parts))
        shares = whole.unflatten(2, (parts, -1))  # 3 n P K/P d
        shares = _Exchange.apply(shares.permute(2, 0, 1, 3, 4).contiguous(), others)  # P 3 n K/P d
        q, k, v = shares.permute(1, 0, 2, 3, 4).flatten(1, 2)  # all tokens, a part of the heads
        out = attend(q, k, v, q_lengths, k_lengths).unflatten(0, (parts, -1))
        return _Exchange.apply(out.contiguous(), others).transpose(0, 1).flatten(1, 2)[:, :heads]

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
