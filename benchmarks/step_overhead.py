"""Step time of the trainer against the same model in a bare forward, backward, clip, AdamW loop.

    python -m benchmarks.step_overhead [rounds=3] [tokens=6144]

Both train the same 20M-parameter model in fp32 on the same packs, in turns in one process: a round is a few steps of
one, then of the other. Packs differ in what they cost, so each step is compared with the bare loop's step on its own
pack. The trainer does everything it does in a run: decoding, VAE, ledger, ZeRO, EMA, metrics. The bare loop gets its
packs ready in memory; beside it stands a bare loop that doesn't encode with the VAE either. What DeepSpeed copies in a
step doesn't grow with the pack, so the overhead depends on `tokens`, the most that a pack holds. Peak memory is that of
one process each.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from torch import nn

from benchmarks.report import write
from sora_train.config.cost import geometry
from sora_train.config.hydra import CONF
from sora_train.config.load import build
from sora_train.config.schema import Config
from sora_train.core.batch import Pack
from sora_train.core.world import World
from sora_train.data.loader import Loader
from sora_train.data.order.plan import Position
from sora_train.data.read.pool import Pool
from sora_train.data.shards import Shards
from sora_train.methods.diffusion.learner import start
from sora_train.operations.build import build_trainer
from sora_train.training.engine.process_group import connect
from sora_train.training.trainer import Trainer

_STEPS = 3  # of each in a round, after one that isn't counted
_OVERRIDES = (
    "experiment=demo", "model=20m", "data.slots=1", "data.max_pixels=4096", "steps=100000",
    "logging.every_steps=1", "logging.validate_every=0", "logging.sample_every=0", "checkpoint.every_steps=100000",
    "logging.writers=[]", "optim.lr=1e-5",
)  # fmt: skip


def _config(run_dir: str, stage: int, tokens: int) -> Config:
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        own = [f"run_dir={run_dir}", f"deepspeed=zero{stage}", f"data.max_tokens={tokens}"]
        return build(compose("train", [*_OVERRIDES, *own]))


def _trainer(config: Config, pool: Pool, device: torch.device) -> Trainer:
    shards = Shards(config)
    shards.index()
    return build_trainer(config, World(), device, shards, pool)


def _run_trainer(trainer: Trainer) -> list[float]:
    """Seconds for 1,000 tokens in each of a few more steps of a run, from its own metrics."""
    trainer.config.steps = trainer.step + _STEPS + 1
    trainer.train()
    lines = (trainer.run_dir / "metrics.jsonl").read_text().splitlines()[-_STEPS:]
    return [1000.0 / json.loads(line)["tokens_per_s"] for line in lines]


def _running(run_dir: str, stage: int, tokens: int, pool: Pool, device: torch.device) -> Callable[[], list[float]]:
    return partial(_run_trainer, _trainer(_config(run_dir, stage, tokens), pool, device))


def _bare(config: Config, device: torch.device, packs: list[Pack], encode: bool) -> Callable[[], list[float]]:
    """A bare loop over packs in memory, with the VAE in the step or before it."""
    torch.manual_seed(config.seed)
    learner = start(config, device)
    network = learner.networks[learner.name].module.to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.optim.lr, fused=True)
    ready = [learner.prepare(pack) for pack in packs] if not encode else []
    turn = iter(range(10**9))
    tokens = [sum(geometry(config).tokens(*clip.visit.size) for clip in pack.clips) for pack in packs]

    def step() -> int:
        number = next(turn) % len(packs)
        if encode:
            loss = learner.loss(network, packs[number]).sum / learner.weight(packs[number])
        else:
            latents = ready[number]
            video = latents.video
            error = (network(latents) - video.target_NP).square().mean(1)
            loss = (error * video.weight_N).sum() / video.weight_N.sum()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), config.optim.clip)
        optimizer.step()
        optimizer.zero_grad()
        return tokens[number]

    def run() -> list[float]:
        times = []
        for _ in range(_STEPS + 1):
            start = time.perf_counter()
            done = step()
            times.append(1000.0 * (time.perf_counter() - start) / done)
        return times[1:]

    return run


def _packs(trainer_config: Config, pool: Pool, rounds: int) -> list[Pack]:
    """Those that the trainer sees in so many rounds, in its order."""
    plan = Shards(trainer_config).plan(trainer_config)
    return [step.packs[0] for step in islice(Loader(plan, pool, [[0]], Position(), 2), rounds * (_STEPS + 1))]


def main() -> None:
    """Run in turns, or (with `only=NAME`) one of them alone for its peak memory."""
    arguments = dict(a.split("=") for a in sys.argv[1:])
    tokens, rounds = int(arguments.get("tokens", 6144)), int(arguments.get("rounds", 3))
    device = connect(World())
    torch.set_num_threads(1)  # what decodes has the other cores to itself, as beside a GPU
    with tempfile.TemporaryDirectory() as folder, Pool(1) as pool:
        makers: dict[str, Callable[[], Callable[[], list[float]]]] = {
            f"trainer, ZeRO {stage}": partial(_running, f"{folder}/{stage}", stage, tokens, pool, device)
            for stage in (0, 1)
        }
        config = _config(f"{folder}/bare", 0, tokens)
        makers["bare loop"] = lambda: _bare(config, device, _packs(config, pool, rounds), encode=True)
        makers["bare loop, latents ready"] = lambda: _bare(config, device, _packs(config, pool, rounds), encode=False)
        if "only" in arguments:
            makers[arguments["only"]]()()
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
            return
        peaks = {name: _peak(name, tokens) for name in makers}  # first: a child's figure begins at its parent's
        runs = {name: make() for name, make in makers.items()}
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(rounds):
            for name, run in runs.items():
                times[name] += run()
    base = times["bare loop"]
    rows = []
    for name, values in times.items():
        low, middle, high = statistics.quantiles([a / b - 1 for a, b in zip(values, base, strict=True)], n=4)
        seconds, memory = f"{statistics.median(values):.3f} s", f"{peaks[name]:.0f} MiB"
        rows.append((name, seconds, f"{middle:+.1%}", f"{low:+.1%} to {high:+.1%}", memory))
    write(
        "Step time of the trainer against a bare loop",
        f"20M parameters, fp32, one thread, packs of up to {tokens:,} tokens, {rounds} rounds of {_STEPS} steps.",
        ("loop", "seconds for 1,000 tokens", "against bare, same pack", "middle half", "peak memory of the process"),
        rows,
    )


def _peak(name: str, tokens: int) -> float:
    command = [sys.executable, "-m", "benchmarks.step_overhead", f"only={name}", f"tokens={tokens}"]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    return int(out.stdout.split()[-1]) / 1024


if __name__ == "__main__":
    main()
