"""What all logging costs a step, against the same steps without any of it.

    python -m benchmarks.logging_cost [rounds=12] [steps=30] [every=10] [model=demo]

Two trainers in one process take the same steps of the same plan in turns, a round of one and then a round of the other.
With logging: metrics.jsonl, TensorBoard, wandb (offline), Prometheus (a port that is read while it runs), the line on
the terminal, the meter with loss by noise level and by task, the slowest rank. Without: the task works out its loss
alone, nothing is counted, read or written. A logged step costs more than the others, so what is compared is the mean
step of a round, waits for data aside; packs differ from round to round, so each is compared with its counterpart. Time
is CPU time of the process with all its threads, in which other work on the machine hardly shows; what wandb's own
process does beside it isn't in it. The demo model is the worst case: its steps are the shortest.
"""

from __future__ import annotations

import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.report import write
from sora_train import config as configuration
from sora_train.assemble import Shards, build_trainer
from sora_train.batch import Pack
from sora_train.compose import CONF
from sora_train.config import Config
from sora_train.data.pool import Pool
from sora_train.flow.prediction import velocity
from sora_train.flow.rectified import FlowTask, Loss
from sora_train.generation import build_vae
from sora_train.training.meter import Meter
from sora_train.training.trainer import Trainer
from sora_train.training.zero import connect
from sora_train.world import World

_SCRAPE_S = 15.0  # Prometheus's usual interval
_WARM_UP = 2  # rounds that aren't counted: what is encoded once is encoded there


class _Bare(FlowTask):
    """The loss and nothing beside it."""

    def loss(self, network: Any, pack: Pack, device: torch.device) -> Loss:
        latents = self.prepare(pack, device)
        velocity_NP = velocity(self.config.prediction, network(latents), latents)
        error_N = (velocity_NP - latents.target_NP).square().mean(1) * latents.weight_N
        nothing: Tensor = error_N.new_empty(0)
        return Loss(error_N.sum(), nothing, nothing)


class _Silent(Meter):
    """Counts nothing."""

    def add(self, pack: Pack, loss: Any, weight: float) -> None:
        return

    def step_done(self, samples: int, tokens: int, refused: int, applied: bool) -> None:
        return


class Run:
    """A trainer that goes on for a round of steps at a time, and how long each took."""

    def __init__(self, config: Config, pool: Pool, device: torch.device, logs: bool) -> None:
        shards = Shards(config)
        shards.index()
        self.times: list[float] = []
        self.reports: list[float] = []  # seconds in each logged step's report
        self.trainer = trainer = build_trainer(config, World(), device, shards, pool)
        trainer.saves = lambda: False  # type: ignore[method-assign]
        real = trainer.parts.steps_from
        trainer.parts.steps_from = lambda *where: self._timed(real(*where))
        if logs:
            self._time_reports(trainer)
        else:
            trainer.parts.task.__class__ = _Bare
            trainer.meter.__class__ = _Silent
            trainer.report = lambda: None  # type: ignore[method-assign]

    def round(self, steps: int) -> float:
        """Mean seconds of the next `steps` steps; one more is taken, whose end nobody waits for."""
        self.times.clear()
        self.trainer.config.steps = self.trainer.step + steps + 1
        self.trainer.loop()
        return statistics.fmean(self.times)

    def _timed(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            start = time.process_time()
            yield batch
            self.times.append(time.process_time() - start)

    def _time_reports(self, trainer: Trainer) -> None:
        real = trainer.report

        def report() -> None:
            start = time.process_time()
            real()
            if trainer.due(trainer.config.logging.every_steps):
                self.reports.append(time.process_time() - start)

        trainer.report = report  # type: ignore[method-assign]


def _config(folder: Path, name: str, model: str, every: int, writers: str, port: int) -> Config:
    overrides = [
        "experiment=demo", f"model={model}", f"run_dir={folder}/{name}", "steps=1000000", f"vae.path={folder}/vae",
        f"data.sources.demo.shards=[{folder}/data/train-*.tar]", "data.validation=[]", "optim.lr=1e-5",
        f"logging.every_steps={every}", "logging.validate_every=0", "logging.sample_every=0",
        f"logging.writers=[{writers}]", f"logging.prometheus_port={port}", "logging.peak_tflops=1",
    ]  # fmt: skip
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        return configuration.build(compose("train", overrides), need_vae=False)


def _scraped(port: int, end: threading.Event) -> None:
    while not end.wait(_SCRAPE_S):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read()


def measure(rounds: int, steps: int, every: int, model: str) -> tuple[list[float], list[float], list[float]]:
    """Mean step of each round with logging, without, and seconds of each report."""
    with tempfile.TemporaryDirectory() as name, Pool(1) as pool, socket.socket() as probe:
        folder = Path(name)
        make = [sys.executable, "-m", "data_tools.make_demo", f"out={folder}/data", "clips=96", "held_out=0"]
        subprocess.run([*make, "shard_clips=48"], check=True, cwd=Path(__file__).parents[1])
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        everything = _config(folder, "with", model, every, "tensorboard,wandb,prometheus", port)
        nothing = _config(folder, "without", model, every, "", 0)
        (folder / "vae").mkdir()
        save_file(build_vae(everything.vae).state_dict(), folder / "vae/vae.safetensors")
        device = connect(World())
        torch.set_num_threads(1)  # what decodes and wandb's own process have the other core
        runs = [Run(everything, pool, device, logs=True), Run(nothing, pool, device, logs=False)]
        end = threading.Event()
        reader = threading.Thread(target=_scraped, args=(port, end))
        reader.start()
        for _ in range(_WARM_UP):
            for run in runs:
                run.round(steps)
        runs[0].reports.clear()
        times: dict[int, list[float]] = {0: [], 1: []}
        for number in range(rounds):
            for which in (0, 1) if number % 2 else (1, 0):  # neither always comes second
                times[which].append(runs[which].round(steps))
        end.set()
        reader.join()
        for run in runs:
            run.trainer.close()
        written = {path.name for path in (folder / "with").iterdir()}
        assert {"metrics.jsonl", "tensorboard", "wandb"} <= written, written  # nothing was left out with a warning
    return times[0], times[1], runs[0].reports


def main() -> None:
    """Measure, and write the table."""
    given = dict(a.split("=") for a in sys.argv[1:])
    rounds, steps, every = (int(given.get(key, value)) for key, value in (("rounds", 12), ("steps", 30), ("every", 10)))
    model = given.get("model", "demo")
    os.environ["WANDB_MODE"] = "offline"
    on, off, reports = measure(rounds, steps, every, model)
    rows = []
    for name, values in {"with all logging": on, "without": off, "report of a logged step": reports}.items():
        low, middle, high = statistics.quantiles(values, n=4)
        rows.append((name, f"{1e3 * middle:.1f} ms", f"{1e3 * low:.1f} to {1e3 * high:.1f}"))
    low, middle, high = statistics.quantiles([a / b - 1 for a, b in zip(on, off, strict=True)], n=4)
    rows.append(("**cost of all logging**", f"**{middle:+.2%}**", f"{low:+.2%} to {high:+.2%}"))
    write(
        "Step time with all logging against none",
        f"{model} model, one rank and thread, {rounds} rounds of {steps} steps each in turns, logged every {every} "
        "steps; CPU time: medians of the rounds' mean steps, and of the ratios of a round to its counterpart.",
        ("", "median", "middle half"),
        rows,
    )


if __name__ == "__main__":
    main()
