"""Indexing on a cluster: each node indexes a share of the shards and sends the indexes to the other nodes.

Indexes of remote shards are stored in a cache on each node. The first rank of each node fetches indexes that exist
beside the shards. Shards that are then without an index on all nodes are divided among the nodes, indexed once, and
every index is sent to the nodes that lack it. Indexing may take hours, so ranks wait in a process group with a time-out
of days; a rank that dies is detected by its closed connection.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from sora_train.core.cli import InputError
from sora_train.core.world import World
from sora_train.data.index.make import take_index
from sora_train.data.index.places import index_path
from sora_train.data.shards import Wanted

_PATIENCE = timedelta(days=30)
_log = logging.getLogger(__name__)


def index_everywhere(wanted: Wanted, world: World) -> None:
    """Make sure that every node has the index of every shard. Collective.

    Raises InputError, on all ranks, if a shard can't be read on a node, or differs between nodes.
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
    """Choose the node that provides the index of each shard.

    Args:
        lacking: Shards without an index on each node, by the node's first rank.

    Returns:
        For each shard that a node lacks, the first rank of a node that has its index, or that shall make it.
    """
    sets = {rank: set(shards) for rank, shards in sorted(lacking.items())}
    owners: dict[str, int] = {}
    for number, shard in enumerate(sorted(set().union(*sets.values()))):
        having = [rank for rank in sets if shard not in sets[rank]] or list(sets)
        owners[shard] = having[number % len(having)]
    return owners


class _Nodes:
    """Collective operations of the nodes of a run; the first rank of a node acts for it."""

    def __init__(self, wanted: Wanted, world: World, every: Any) -> None:
        self.wanted, self.world, self.every = wanted, world, every
        self.leads = world.local_rank == 0

    def lacking(self, shards: Sequence[str]) -> dict[int, list[str]]:
        """Find the shards without an index on each node, by the node's first rank."""
        found: list[str] = []
        _together(lambda: found.extend(self.wanted.missing(shards) if self.leads else []), self.every)
        told: list[Any] = [None] * self.world.size
        dist.all_gather_object(told, found if self.leads else None, group=self.every)
        return {rank: missing for rank, missing in enumerate(told) if missing is not None}

    def hand_over(self, lacking: Mapping[int, Sequence[str]]) -> None:
        """Send indexes from the nodes that have them to the nodes that lack them."""
        leaders, owners, w = sorted(lacking), share_out(lacking), self.wanted
        group = dist.new_group(leaders, backend="gloo", timeout=_PATIENCE)
        refused: list[InputError] = []  # raised after the loop, since every rank must take part in every broadcast

        def send() -> None:
            """Broadcast each missing index from its owner; every leader stores those that its node lacks."""
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
    """Call `work` on every rank; if it raises InputError on any, raise it on all."""
    said = ""
    try:
        work()
    except InputError as error:
        said = str(error)
    everyone = [""] * dist.get_world_size(group)
    dist.all_gather_object(everyone, said, group=group)
    if wrong := [line for line in everyone if line]:
        raise InputError(wrong[0])
