"""Tokens shared out over ranks: losses and gradients are those of one rank, at every ZeRO stage and degree."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sora_train.core.batch import LatentPack, Layout, Stream
from sora_train.core.cli import InputError
from sora_train.core.world import World
from sora_train.models.layers.ulysses import part_of

WORKER = Path(__file__).with_name("ulysses_worker.py")


def pack() -> LatentPack:
    layout = Layout(((1, 2, 3), (2, 2, 2), (1, 1, 1)), (3, 1, 2))
    n = layout.tokens
    x_NP = torch.arange(2.0 * n).view(n, 2)
    video = Stream(layout, x_NP, x_NP, torch.ones(n), torch.zeros(4), torch.arange(n) % 4, torch.zeros(n))
    return LatentPack({"video": video}, None)


def test_parts_end_to_end_are_the_pack_and_what_pads_it_looks_at_the_last_caption() -> None:
    whole = pack()  # 15 tokens
    parts = [part_of(whole, place, 4).video for place in range(4)]
    assert [len(p.x_NP) for p in parts] == [len(p.t_of_N) for p in parts] == [4, 4, 4, 4]
    assert torch.equal(torch.cat([p.x_NP for p in parts])[:15], whole.video.x_NP)
    assert torch.equal(torch.cat([p.t_of_N for p in parts])[:15], whole.video.t_of_N)
    assert {p.layout.lengths for p in parts} == {(6, 8, 1, 1)}
    assert [p.layout.queries for p in parts] == [(4, 0, 0), (2, 2, 0), (0, 4, 0), (0, 2, 2)]
    assert whole.video.layout.queries == whole.video.layout.lengths
    assert part_of(whole, 1, 3).video.layout.grids == whole.video.layout.grids, "15 tokens divide by 3"


def test_places_in_groups_of_neighbours() -> None:
    world = World(rank=5, size=8).with_sequence(4)
    assert (world.sequence_rank, world.data_rank, world.data_size) == (1, 1, 2)
    assert World(rank=5, size=8).data_rank == 5
    with pytest.raises(InputError, match="parallel.sequence=3 doesn't divide the 8"):
        replace(world, sequence=1).with_sequence(3)


@pytest.mark.parametrize(
    "cases",
    [
        ("2:1", "0:3"),
        pytest.param(tuple(f"{n}:{stage}" for n in (2, 4, 0) for stage in range(4)), marks=pytest.mark.campaign),
    ],
)
def test_two_and_four_ranks_equal_one_rank(python: str, cases: tuple[str, ...]) -> None:
    """One launch of four ranks, cases of (degree, ZeRO stage); degree 2 stands beside data parallelism of 2, 0 is a
    degree of its own for each pack. Then they sample together: the same seeds, the same videos, on every rank."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parents[3])}
    command = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4", str(WORKER)]
    done = subprocess.run([*command, *cases], capture_output=True, text=True, env=environment, timeout=290)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert done.stdout.count("equal to one rank\n") == len(cases)
    assert done.stdout.count("samples equal to one rank's") == 4
