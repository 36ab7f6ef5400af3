"""Jobs of a sweep: each runs under a torchrun of its own, in its own run folder and on its own GPUs."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from queue import SimpleQueue
from types import FrameType
from typing import Any

from sora_train.core.cli import STOPPED
from sora_train.operations.records import read

_SHUTDOWN_S = 300  # seconds that a stopped job has to save


@dataclass(frozen=True)
class Job:
    """One run of a sweep."""

    run_dir: Path
    overrides: list[str]
    flags: list[str] = field(default_factory=list)  # of Hydra, such as --config-dir

    def command(self, ranks: int) -> list[str]:
        """Command that starts the job; given again, it resumes the job."""
        return [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "localhost",
            "--nproc-per-node", str(ranks), "--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1",
            "--shutdown-timeout", str(_SHUTDOWN_S),
            "-m", "sora_train.train", *self.flags, *self.overrides, f"run_dir={self.run_dir}",
        ]  # fmt: skip


@dataclass(frozen=True)
class Result:
    """Outcome of a job."""

    code: int
    reason: str
    figure: float  # last value of the metric; inf if there is none


class _Stop:
    """Signal handler that stops the running jobs and starts no others."""

    def __init__(self) -> None:
        self.asked, self.running, self.lock = False, set[subprocess.Popen[bytes]](), threading.Lock()

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        self.asked = True
        for process in list(self.running):
            process.send_signal(signal.SIGTERM)

    def run(self, command: list[str], environment: dict[str, str], log: Path) -> int | None:
        """Run a command and return its exit code; None if the sweep was stopped before it started."""
        with log.open("ab") as out:
            with self.lock:
                if self.asked:
                    return None
                process = subprocess.Popen(
                    command, stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True
                )
                self.running.add(process)
            code = process.wait()
            self.running.discard(process)
            return code


def config_flags(arguments: Sequence[str]) -> list[str]:
    """Hydra's flags for folders of configuration files among the arguments of a command, each with its value."""
    names = ("--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn")
    found: list[str] = []
    for place, argument in enumerate(arguments):
        if argument in names:
            found += arguments[place : place + 2]
        elif argument.partition("=")[0] in names:
            found.append(argument)
    return found


def run_jobs(jobs: Sequence[Job], ranks: int, together: int, metric: str) -> list[Result]:
    """Run all jobs.

    Args:
        jobs: The jobs.
        ranks: Ranks of each job; 0: one per GPU, or 2 on a CPU.
        together: Jobs that run at the same time, each on its own GPUs; 0: as many as the GPUs suffice for.
        metric: Figure of the results; the training loss stands in if a run doesn't have it.

    Returns:
        Results in the order of the jobs.
    """
    gpus = _gpus()
    ranks = ranks or len(gpus) or 2
    together = together or max(1, len(gpus) // ranks)
    places: SimpleQueue[int] = SimpleQueue()
    for place in range(together):
        places.put(place)
    stop = _Stop()
    before = {s: signal.signal(s, stop) for s in (signal.SIGTERM, signal.SIGINT)}

    def work(job: Job) -> Result:
        """Run one job on the next free set of GPUs."""
        place = places.get()
        try:
            mine = gpus[place * ranks : (place + 1) * ranks]
            environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ",".join(mine)} if mine else {})
            job.run_dir.mkdir(parents=True, exist_ok=True)
            (job.run_dir / "exit.json").unlink(missing_ok=True)
            print(f"{job.run_dir.name}: {' '.join(job.overrides)}", flush=True)
            code = stop.run(job.command(ranks), environment, job.run_dir / "output.log")
            return _result(job, code, metric)
        finally:
            places.put(place)

    try:
        with ThreadPoolExecutor(together) as pool:
            return list(pool.map(work, jobs))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _gpus() -> list[str]:
    """List the GPUs that jobs may use, as entries of CUDA_VISIBLE_DEVICES."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        names = [name.strip() for name in visible.split(",")]
        # as CUDA reads it: what follows a number below 0 doesn't count
        return [name for name in takewhile(lambda name: not name.startswith("-"), names) if name]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def _result(job: Job, code: int | None, metric: str) -> Result:
    """Read a job's result. The exit code is taken from exit.json, because torchrun turns every code into 1."""
    if code is None:
        return Result(STOPPED, "not started: the sweep was stopped", math.inf)
    note = job.run_dir / "exit.json"
    said: dict[str, Any] = {"code": code, "reason": "died; see output.log"}
    if note.is_file():
        said = json.loads(note.read_text())
    if said["code"] != 0:
        return Result(int(said["code"]), str(said["reason"]), math.inf)
    record = read(job.run_dir)
    figure = record.last(metric)
    figure = record.last("loss") if figure is None else figure
    return Result(0, "done", math.inf if figure is None or math.isnan(figure) else figure)


def summary(root: Path, jobs: Sequence[Job], results: Sequence[Result]) -> None:
    """Print the table of all jobs of a sweep, write `sweep.html` and `sweep.png`, and print failed jobs."""
    from sora_train.operations.report import runs_page
    from sora_train.operations.side_by_side import plot, table

    records = [read(path.parent) for path in sorted(root.glob("*/config.yaml"))]
    if records:
        figures = ["loss", "validation_loss", "tokens_per_s"]
        table(records, figures)
        (root / "sweep.html").write_text(runs_page(f"Sweep {root.name}", records), encoding="utf-8")
        if any(len(record.curves.get("loss", [])) > 1 for record in records):
            plot(records, ["loss", "validation_loss"], root / "sweep.png")
    for job, result in zip(jobs, results, strict=True):
        if result.code != 0:
            print(f"{job.run_dir.name} ended with code {result.code}: {result.reason}", file=sys.stderr)
    if any(result.code for result in results):
        print("give the same command again: finished jobs end at once, the others go on", file=sys.stderr)
