"""Process group of a run."""

from __future__ import annotations

import os
from datetime import timedelta

import deepspeed
import torch
import torch.distributed as dist

from sora_train.core.cli import InputError
from sora_train.core.world import World

_TIMEOUT = timedelta(days=1)  # the watch sees hangs much sooner; all ranks may be suspended for long


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
