"""One rank of `benchmarks.slots`: the same clips as steps of several ways, in turns.

Reads its configuration from the JSON file that its argument names, and rank and meeting point from the environment.
Rank 0 writes what all ranks measured to a file.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from hydra import compose, initialize_config_dir
from torch import Tensor

from sora_train.config.hydra import CONF
from sora_train.config.load import build
from sora_train.config.schema import Config
from sora_train.core.batch import Clip, Pack
from sora_train.core.world import World, from_environment
from sora_train.data.loader import Sharing, passes_of_rank
from sora_train.data.order.packing import spans
from sora_train.forecast.calibration import pack_of
from sora_train.methods.diffusion.learner import DiffusionLearner, planned
from sora_train.models.layers import ulysses
from sora_train.training.engine.engines import Engines
from sora_train.training.engine.process_group import connect, disconnect

Size = tuple[int, int, int]  # frames, height, width


@dataclass
class Way:
    """A way to take the same steps."""

    name: str
    steps: list[list[list[int]]]  # clips of each slot of each step
    most: int = 1  # slots that a pack may take
    fixed: int = 1  # ranks that share all packs


@dataclass
class Asked:
    """The measurements to take."""

    overrides: list[str]
    sizes: list[Size]  # of each clip
    latents: bool  # clips are encoded before
    ways: list[Way]
    rounds: int
    out: str


@dataclass
class Found:
    """Measurements of one way, over rounds and steps."""

    seconds: list[float] = field(default_factory=list)  # of each step, by its slowest rank
    cpu_seconds: list[float] = field(default_factory=list)  # of each step, summed over ranks
    slowest: list[float] = field(default_factory=list)  # CPU seconds of the rank that spends most, of each step
    slots: list[list[list[float]]] = field(default_factory=list)  # CPU seconds: round, step, pass of each rank
    losses: list[float] = field(default_factory=list)  # of each step of the first round


class Taken:
    """The steps of one way on this rank: its engine, and its packs of each step."""

    def __init__(self, way: Way, config: Config, asked: Asked, world: World) -> None:
        self.world = world.with_sequence(way.fixed)
        self.groups = ulysses.sequence_groups(self.world, way.most)
        torch.manual_seed(config.seed)
        self.learner = planned(config)
        network: Any = self.learner.networks[DiffusionLearner.name].module
        if self.groups.neighbours:
            network.split_sequence(self.groups)
        sharing = Sharing((self.world.sequence_rank, way.fixed), self.world.sharing(way.most))
        slots = len(way.steps[0])
        passes = passes_of_rank(slots, self.world.data_rank, self.world.data_size, None)
        networks = {DiffusionLearner.name: self.learner.networks[DiffusionLearner.name]}
        self.engines = Engines(networks, len(passes), config)
        self.steps = []
        for step in way.steps:
            own = [sharing.of(passed, spans(step, way.most)) for passed in passes]
            clips = [sorted((n for slot in taken for n in step[slot]), key=asked.sizes.__getitem__) for taken, _ in own]
            packs = [[_clip(config, asked, n) for n in numbers] for numbers in clips]
            self.steps.append([Pack(pack, part=part) for pack, (_, part) in zip(packs, own, strict=True)])
        self.weights = [_sum([self.learner.weight(p) / p.part[1] for p in packs]) for packs in self.steps]

    def step(self, number: int) -> tuple[list[float], float]:
        """Take a step that changes no weight; CPU seconds of each pass, and this rank's part of the loss."""
        engine, spent, loss = self.engines[DiffusionLearner.name], [], 0.0
        weight = self.weights[number]
        self.engines.set_pace(weight, 0.0, lambda: None)
        for pack in self.steps[number]:
            start = time.thread_time()
            found = self.learner.loss(engine, pack)
            engine.backward(found.sum / pack.part[1])
            spent.append(time.thread_time() - start)
            loss += float(found.sum.detach()) / pack.part[1] / weight
        engine.step()
        return spent, loss


def _clip(config: Config, asked: Asked, number: int) -> Clip:
    """A clip by its number, the same on every rank and in every way."""
    torch.manual_seed(number)
    return pack_of(config, [asked.sizes[number]], asked.latents, seed=number).clips[0]


def _sum(numbers: Sequence[float]) -> float:
    total = torch.tensor(sum(numbers), dtype=torch.float64)
    dist.all_reduce(total)
    return float(total)


def main() -> None:
    """Measure, and write what was found."""
    given = json.loads(Path(sys.argv[1]).read_text())
    asked = Asked(**{**given, "ways": [Way(**way) for way in given["ways"]]})
    asked.sizes = [(frames, height, width) for frames, height, width in asked.sizes]
    world = from_environment()
    connect(world)
    torch.set_num_threads(1)
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        config = build(compose("train", ["run_dir=runs/slots", *asked.overrides]), need_vae=False)
    ways = {way.name: Taken(way, config, asked, world) for way in asked.ways}
    found = {name: Found() for name in ways}
    for turn in range(asked.rounds + 1):
        for name, way in ways.items():
            _round(way, found[name], counts=turn > 0)
    if world.is_main:
        Path(asked.out).write_text(json.dumps({name: asdict(values) for name, values in found.items()}))
    disconnect()


def _round(way: Taken, found: Found, counts: bool) -> None:
    """Take every step once, and add what all ranks measured."""
    spent = []
    for number in range(len(way.steps)):
        dist.barrier()
        start, cpu = time.perf_counter(), time.process_time()
        passes, loss = way.step(number)
        times = torch.tensor([time.perf_counter() - start, time.process_time() - cpu, loss], dtype=torch.float64)
        every = [torch.zeros_like(times) for _ in range(way.world.size)]
        dist.all_gather(every, times)
        by_rank: list[Tensor] = [torch.zeros(len(passes), dtype=torch.float64) for _ in range(way.world.size)]
        dist.all_gather(by_rank, torch.tensor(passes, dtype=torch.float64))
        if counts:
            found.seconds.append(max(float(t[0]) for t in every))
            found.cpu_seconds.append(sum(float(t[1]) for t in every))
            found.slowest.append(max(float(t[1]) for t in every))
        else:
            found.losses.append(sum(float(t[2]) for t in every))
        spent.append(torch.stack(by_rank, 1).flatten().tolist())  # pass by pass, so slot by slot
    if counts:
        found.slots.append(spent)


if __name__ == "__main__":
    main()
