"""Cost of all logging in a step, against the same steps without any of it.

    python -m benchmarks.logging_cost [rounds=36] [every=10] [model=demo]

Two trainers in one process take the same steps of the same plan in turns, one step each: a core's speed changes within
seconds where other work comes and goes, and two steps on one pack follow each other within a fraction of one. With
logging: metrics.jsonl, TensorBoard, wandb (offline), Prometheus (a port that is read while it runs), the line on the
terminal, the meter with loss by noise level and by task, the slowest rank. Without: the task works out its loss alone,
nothing is counted, read or written. A logged step costs more than the others, so a round is as many pairs of steps as
lie between two logged ones, and what is compared is its sum, waits for data aside. Time is CPU time of the process with
all its threads, in which other work on the machine hardly shows; what wandb's own process does beside it isn't in it.
The demo model is the worst case: its steps are the shortest.
"""

from __future__ import annotations

import math
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
from sora_train.config.hydra import CONF
from sora_train.config.load import build
from sora_train.config.schema import Config
from sora_train.core.batch import LatentPack, Pack
from sora_train.core.loss import Loss
from sora_train.core.world import World
from sora_train.data.read.pool import Pool
from sora_train.data.shards import Shards
from sora_train.flow.objective import FlowObjective
from sora_train.flow.prediction import velocity
from sora_train.models.video_vae.model import build_vae
from sora_train.operations.build import build_trainer
from sora_train.training.engine.process_group import connect
from sora_train.training.report.meter import Meter
from sora_train.training.trainer import Trainer

_SCRAPE_S = 15.0  # Prometheus's usual interval
_WARM_UP = 60  # pairs that aren't counted: what is encoded once is encoded there
_LONG_S = 300.0  # a step never takes so long


class _Bare(FlowObjective):
    """The loss and nothing beside it."""

    def loss(self, output_NP: Tensor, pack: Pack, latents: LatentPack) -> Loss:
        video = latents.video
        velocity_NP = velocity(self.config.prediction, output_NP, video)
        return Loss(((velocity_NP - video.target_NP).square().mean(1) * video.weight_N).sum())


class _Silent(Meter):
    """Counts nothing."""

    def add(self, losses: Any, weight: float) -> None:
        return

    def step_done(self, samples: int, tokens: int, refused: int, applied: bool) -> None:
        return


class Run:
    """A trainer in a thread of its own that takes one step at a time, when it is told to."""

    def __init__(self, config: Config, pool: Pool, device: torch.device, logs: bool) -> None:
        shards = Shards(config)
        shards.index()
        self.reports: list[float] = []  # seconds in each logged step's report
        self.trainer = trainer = build_trainer(config, World(), device, shards, pool)
        trainer.saves = lambda: False  # type: ignore[method-assign]
        real = trainer.parts.steps_from
        trainer.parts.steps_from = lambda *where: self._in_turn(real(*where))
        if logs:
            self._time_reports(trainer)
        else:
            trainer.learner.objective.__class__ = _Bare  # type: ignore[attr-defined]
            trainer.meter.__class__ = _Silent
            trainer.report = lambda: None  # type: ignore[method-assign]
        self._go, self._ready, self._last = threading.Semaphore(0), threading.Semaphore(0), 0.0
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._thread.start()
        self._wait()

    def step(self) -> float:
        """CPU seconds of the next step; comes back when the data of the one after it are there."""
        self._go.release()
        self._wait()
        return self._last

    def close(self) -> None:
        """Take a last step, and end."""
        self.trainer.config.steps = self.trainer.step + 1
        self._go.release()
        self._thread.join(_LONG_S)
        self.trainer.close()

    def _wait(self) -> None:
        if not self._ready.acquire(timeout=_LONG_S):
            raise RuntimeError("a trainer takes no more steps; why stands above")

    def _loop(self) -> None:
        torch.set_num_threads(1)  # of each thread its own; what decodes and wandb's own process have the other core
        self.trainer.loop()

    def _in_turn(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            self._ready.release()
            self._go.acquire()
            start = time.process_time()
            yield batch
            self._last = time.process_time() - start

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
        return build(compose("train", overrides), need_vae=False)


def _scraped(port: int, end: threading.Event) -> None:
    while not end.wait(_SCRAPE_S):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read()


def measure(rounds: int, every: int, model: str) -> tuple[list[float], list[float], list[float]]:
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
        runs = [Run(everything, pool, device, logs=True), Run(nothing, pool, device, logs=False)]
        end = threading.Event()
        reader = threading.Thread(target=_scraped, args=(port, end))
        reader.start()
        for _ in range(_WARM_UP // every * every):
            for run in runs:
                run.step()
        runs[0].reports.clear()
        means: tuple[list[float], list[float]] = ([], [])
        for _ in range(rounds):
            times: tuple[list[float], list[float]] = ([], [])
            for number in range(every):
                for which in (0, 1) if number % 2 else (1, 0):  # neither always comes second
                    times[which].append(runs[which].step())
            for which in (0, 1):
                means[which].append(statistics.fmean(times[which]))
        end.set()
        reader.join()
        for run in runs:
            run.close()
        written = {path.name for path in (folder / "with").iterdir()}
        assert {"metrics.jsonl", "tensorboard", "wandb"} <= written, written  # nothing was left out with a warning
    return means[0], means[1], runs[0].reports


def main() -> None:
    """Measure, and write the table."""
    given = dict(a.split("=") for a in sys.argv[1:])
    rounds, every = (int(given.get(key, value)) for key, value in (("rounds", 36), ("every", 10)))
    model = given.get("model", "demo")
    os.environ["WANDB_MODE"] = "offline"
    on, off, reports = measure(rounds, every, model)
    rows = []
    for name, values in {"with all logging": on, "without": off, "report of a logged step": reports}.items():
        low, middle, high = statistics.quantiles(values, n=4)
        rows.append((name, f"{1e3 * middle:.1f} ms", f"{1e3 * low:.1f} to {1e3 * high:.1f}"))
    costs = [a / b - 1 for a, b in zip(on, off, strict=True)]
    low, middle, high = statistics.quantiles(costs, n=4)
    rows.append(("**cost of all logging**", f"**{middle:+.2%}**", f"{low:+.2%} to {high:+.2%}"))
    mean, error = statistics.fmean(costs), statistics.stdev(costs) / math.sqrt(rounds)
    within = f"{mean - 2 * error:+.2%} to {mean + 2 * error:+.2%}"
    rows.append(("its mean, two standard errors", f"{mean:+.2%}", within))
    write(
        "Step time with all logging against none",
        f"{model} model, one rank and thread, {rounds} rounds of {every} steps each, step by step in turns, one of a "
        "round logged; CPU time: medians of the rounds' mean steps, and of the ratios of a round to its counterpart.",
        ("", "median", "middle half"),
        rows,
    )


if __name__ == "__main__":
    main()
