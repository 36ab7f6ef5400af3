"""The index on every node of a cluster: each node makes its share of what is missing, and hands it to the others.

A node keeps the indexes of remote shards in a cache of its own, so one node's work doesn't help the next by itself. The
first rank of each node adopts what lies beside the shards; what then is missing on all of them is shared out over the
nodes, indexed once, and sent to those that lack it. Indexing may take hours, so the ranks wait in a group whose
time-out is days: a rank that fails is noticed by its closed connection.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from sora_train.core.cli import InputError
from sora_train.core.world import World
from sora_train.data.index.index import index_path, take_index
from sora_train.data.shards import Wanted

_PATIENCE = timedelta(days=30)
_log = logging.getLogger(__name__)


def index_everywhere(wanted: Wanted, world: World) -> None:
    """Have an index of every shard on every node. All ranks together, in a process group.

    Raises InputError on all ranks where a shard can't be read on one node, or is another one there.
    """
    if world.size == 1:
        wanted.make(wanted.shards)
        return
    every = dist.new_group(backend="gloo", timeout=_PATIENCE)
    nodes = _Nodes(wanted, world, every)
    try:
        lacking = nodes.lacking(wanted.shards)
        owners = share_out(lacking)
        if not owners:
            return
        if world.is_main:
            _log.info("indexing %d shard(s) on %d node(s)", len(owners), len(lacking))
        mine = [shard for shard, rank in owners.items() if rank == world.rank and shard in lacking[rank]]
        _together(lambda: wanted.make(mine), every)
        nodes.hand_over(nodes.lacking(list(owners)))
    finally:
        dist.destroy_process_group(every)


def share_out(lacking: Mapping[int, Sequence[str]]) -> dict[str, int]:
    """Choose the node that gives its index of each shard to the others.

    Args:
        lacking: Of the first rank of each node, the shards whose index it lacks.

    Returns:
        Of each shard that any node lacks: the first rank of a node that has it, or else of the one that is to make it.
    """
    sets = {rank: set(shards) for rank, shards in sorted(lacking.items())}
    owners: dict[str, int] = {}
    for number, shard in enumerate(sorted(set().union(*sets.values()))):
        having = [rank for rank in sets if shard not in sets[rank]] or list(sets)
        owners[shard] = having[number % len(having)]
    return owners


class _Nodes:
    """The nodes of a run, each spoken for by its first rank."""

    def __init__(self, wanted: Wanted, world: World, every: Any) -> None:
        self.wanted, self.world, self.every = wanted, world, every
        self.leads = world.local_rank == 0

    def lacking(self, shards: Sequence[str]) -> dict[int, list[str]]:
        """Of the first rank of each node, those of some shards that have no index there."""
        found: list[str] = []
        _together(lambda: found.extend(self.wanted.missing(shards) if self.leads else []), self.every)
        told: list[Any] = [None] * self.world.size
        dist.all_gather_object(told, found if self.leads else None, group=self.every)
        return {rank: missing for rank, missing in enumerate(told) if missing is not None}

    def hand_over(self, lacking: Mapping[int, Sequence[str]]) -> None:
        """Send each index that a node lacks from a node that has it."""
        leaders, owners, w = sorted(lacking), share_out(lacking), self.wanted
        group = dist.new_group(leaders, backend="gloo", timeout=_PATIENCE)
        refused: list[InputError] = []  # raised at the end: the others count on every broadcast

        def send() -> None:
            for shard, owner in owners.items() if self.leads else ():
                parcel: list[Any] = [index_path(shard, w.store).read_bytes() if owner == self.world.rank else None]
                dist.broadcast_object_list(parcel, owner, group=group)
                if shard in lacking[self.world.rank]:
                    try:
                        take_index(shard, parcel[0], w.store, w.limits, w.probe)
                    except InputError as error:
                        refused.append(error)
            if refused:
                raise refused[0]

        _together(send, self.every)
        if self.leads:
            dist.destroy_process_group(group)


def _together(work: Callable[[], None], group: Any) -> None:
    """Do it on every rank, and raise on all what went wrong on any."""
    said = ""
    try:
        work()
    except InputError as error:
        said = str(error)
    everyone = [""] * dist.get_world_size(group)
    dist.all_gather_object(everyone, said, group=group)
    if wrong := [line for line in everyone if line]:
        raise InputError(wrong[0])
