"""One rank of `benchmarks.scaling`: steps of our engines, of DDP and of FSDP2 over the same packs, in turns.

Reads its configuration as JSON from its argument, and rank and meeting point from the environment. Rank 0 writes what
all ranks measured to a file.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from hydra import compose, initialize_config_dir
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.step_parts import Parts, parts_of
from sora_train.config.hydra import CONF
from sora_train.config.load import build
from sora_train.config.schema import Config, Precision
from sora_train.core.batch import LatentPack, Pack
from sora_train.core.world import from_environment
from sora_train.forecast.calibration import pack_of
from sora_train.methods.diffusion.learner import DiffusionLearner, planned
from sora_train.training.agreement import Numbers, Request
from sora_train.training.engine.engines import Engines
from sora_train.training.engine.process_group import connect, disconnect

Step = Callable[["Batch"], None]


@dataclass
class Asked:
    """The measurements to take."""

    overrides: list[str]
    ways: list[str]  # zero0 to zero3, ddp, fsdp2
    clips: list[int]  # frames of each clip of a pack
    pixels: int  # of a clip, square
    rounds: int
    steps: int  # of each way in a round
    out: str


@dataclass
class Batch:
    """A pack whose clips are encoded and noised, and the loss weight of all ranks."""

    pack: Pack
    latents: LatentPack
    weight: float


@dataclass
class Found:
    """Measurements of one way; each step by its slowest rank, and its CPU seconds summed over ranks."""

    seconds: list[float]
    cpu_seconds: list[float]
    parts: Parts
    bytes: float  # of all trained weights in the precision of the pass


def main() -> None:
    """Measure, and write what was found."""
    asked = Asked(**json.loads(sys.argv[1]))
    world = from_environment()
    connect(world)
    torch.set_num_threads(1)
    config = _config(asked.overrides)
    learner = planned(config)
    batches = _batches(config, learner, asked, world.rank)
    steps = {way: _way(way, config, learner) for way in asked.ways}
    taken: dict[str, list[tuple[float, float]]] = {way: [] for way in steps}
    for number in range(asked.rounds + 1):
        for way, step in steps.items():
            dist.barrier()
            for batch in batches:
                times = _timed(step, batch)
                taken[way] += [times] if number else []
    weights = sum(p.nbytes for p in learner.networks[learner.name].module.parameters())
    found = {way: _found(taken[way], steps[way], batches[0], weights) for way in steps}
    if world.is_main:
        Path(asked.out).write_text(json.dumps({way: asdict(values) for way, values in found.items()}))
    disconnect()


def _config(overrides: list[str]) -> Config:
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        fixed = ["experiment=demo", "run_dir=runs/scaling", "optim.matrices=adamw", "parallel.accumulation=1"]
        return build(compose("train", [*fixed, *overrides]), need_vae=False)


def _batches(config: Config, learner: DiffusionLearner, asked: Asked, rank: int) -> list[Batch]:
    """Packs of this rank. All ranks' packs are of equal sizes, so that none waits for a dearer one."""
    side, found = int(asked.pixels**0.5), []
    for number in range(asked.steps):
        sizes = [(frames, side, side) for frames in asked.clips]
        pack = pack_of(config, sizes, latents=True, seed=1000 * number + rank)
        weight = torch.tensor(learner.weight(pack), dtype=torch.float64)
        dist.all_reduce(weight)
        found.append(Batch(pack, learner.prepare(pack), float(weight)))
    return found


def _way(way: str, config: Config, learner: DiffusionLearner) -> Step:
    torch.manual_seed(config.seed)
    if way.startswith("zero"):
        return _ours(config, int(way.removeprefix("zero")), learner)
    network = planned(config).networks[learner.name].module
    return (_ddp if way == "ddp" else _fsdp2)(config, network, learner)


def _loss(learner: DiffusionLearner, network: Any, batch: Batch) -> Tensor:
    return learner.objective.loss(network(batch.latents), batch.pack, batch.latents).sum


def _ours(config: Config, stage: int, learner: DiffusionLearner) -> Step:
    """Engine under ZeRO, with the trainer's agreement on the host."""
    config.deepspeed["zero_optimization"] = {**config.deepspeed.get("zero_optimization", {}), "stage": stage}
    engines = Engines({learner.name: planned(config).networks[learner.name]}, 1, config)
    engine = engines[learner.name]

    def step(batch: Batch) -> None:
        request = Request(Numbers(weight=batch.weight))
        engines.set_pace(batch.weight, 1.0, lambda: None)
        with record_function("part: forward"):
            loss = _loss(learner, engine, batch)
        with record_function("part: backward"):
            engine.backward(loss)
        with record_function("part: update"):
            engine.step()
        request.read()

    return step


def _bare(config: Config, network: nn.Module, learner: DiffusionLearner, batch: Batch, optimizer: Any) -> None:
    with record_function("part: forward"):
        loss = _loss(learner, network, batch) * (dist.get_world_size() / batch.weight)
    with record_function("part: backward"):
        loss.backward()
    with record_function("part: update"):
        nn.utils.clip_grad_norm_(network.parameters(), config.optim.clip)
        optimizer.step()
        optimizer.zero_grad()


def _ddp(config: Config, network: nn.Module, learner: DiffusionLearner) -> Step:
    """DDP with its buckets as gradients; in bf16 without masters in fp32."""
    wrapped = DistributedDataParallel(network, gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-5, fused=True)
    return partial(_with, config, wrapped, learner, optimizer)


def _fsdp2(config: Config, network: nn.Module, learner: DiffusionLearner) -> Step:
    """FSDP2 by block; in bf16 with masters in fp32."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    low = config.precision is Precision.bf16
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if low else MixedPrecisionPolicy()
    network.float()
    for block in network.blocks():  # type: ignore[operator]
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(network, mesh=mesh, mp_policy=policy)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5, fused=True)
    return partial(_with, config, network, learner, optimizer)


def _with(config: Config, network: nn.Module, learner: DiffusionLearner, optimizer: Any, batch: Batch) -> None:
    _bare(config, network, learner, batch, optimizer)


def _timed(step: Step, batch: Batch) -> tuple[float, float]:
    start, cpu = time.perf_counter(), time.process_time()
    step(batch)
    return time.perf_counter() - start, time.process_time() - cpu


def _found(taken: list[tuple[float, float]], step: Step, batch: Batch, weights: float) -> Found:
    """Join the ranks' times, and profile one more step."""
    times = torch.tensor(taken, dtype=torch.float64)
    slowest, cpu = times[:, 0].clone(), times[:, 1].clone()
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    dist.all_reduce(cpu)
    with _profiled() as profiler:
        step(batch)
    return Found(slowest.tolist(), cpu.tolist(), parts_of(profiler.events(), dist.get_world_size()), weights)


@contextmanager
def _profiled() -> Iterator[Any]:
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler, record_function("part: step"):
        yield profiler


if __name__ == "__main__":
    main()
