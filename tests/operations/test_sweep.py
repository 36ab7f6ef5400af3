"""Sweeps whose jobs are processes: places, codes, figures, the table, and the launcher under Hydra."""

from __future__ import annotations

import ast
import json
import math
import os
import signal
import subprocess
import sys
import threading
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from sora_train.operations.records import read
from sora_train.operations.sweep import Job, config_flags, run_jobs, summary

ROOT = Path(__file__).parents[2]

TRAIN = """
import json, os, pathlib, sys, time
run, code, loss = pathlib.Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
(run / "seen").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "none") + f" {time.time()}")
(run / "config.yaml").write_text(f"run_dir: {run}\\noptim: {{lr: {loss}}}\\n")
(run / "metrics.jsonl").write_text(f'{{"step": 1, "loss": 9}}\\n{{"step": 2, "loss": {loss}}}\\n')
time.sleep(0.3)
(run / "exit.json").write_text(json.dumps({"code": code, "reason": "because" if code else "done"}))
sys.exit(bool(code))
"""


class Stub(Job):
    """A job that trains nothing: its overrides are the exit code and the loss it writes."""

    def command(self, ranks: int) -> list[str]:
        return [sys.executable, "-c", TRAIN, str(self.run_dir), *self.overrides]


def test_jobs_run_side_by_side_on_their_own_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4")
    jobs = [Stub(tmp_path / str(n), ["0", str(0.5 + n)]) for n in range(4)]
    results = run_jobs(jobs, ranks=2, together=0, metric="validation_loss")
    assert [(r.code, r.figure) for r in results] == [(0, 0.5), (0, 1.5), (0, 2.5), (0, 3.5)]
    seen = [(job.run_dir / "seen").read_text().split()[0] for job in jobs]
    assert sorted(set(seen)) == ["0,1", "2,3"]  # the fifth has no partner


def test_a_failed_job_is_named_and_the_others_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jobs = [Stub(tmp_path / "0-a", ["0", "0.25"]), Stub(tmp_path / "1-b", ["2", "0.1"])]
    results = run_jobs(jobs, ranks=1, together=1, metric="loss")
    assert [r.figure for r in results] == [0.25, math.inf] and results[1].reason == "because"
    summary(tmp_path, jobs, results)
    out, err = capsys.readouterr()
    assert "1-b ended with code 2: because" in err and "give the same command again" in err
    assert "optim.lr" in out and "0.25" in out
    assert "<polyline" in (tmp_path / "sweep.html").read_text()


def test_a_job_is_torchrun_of_the_training_command(tmp_path: Path) -> None:
    flags = config_flags(["-m", "--config-dir", "mine", "experiment=demo", "-cn=other", "optim.lr=1e-3"])
    assert flags == ["--config-dir", "mine", "-cn=other"]
    command = Job(tmp_path / "0-x", ["experiment=demo", "optim.lr=1e-3"], flags).command(4)
    assert command[1:4] == ["-m", "torch.distributed.run", "--standalone"]
    assert command[command.index("--nproc-per-node") + 1] == "4"
    last = [*flags, "experiment=demo", "optim.lr=1e-3", f"run_dir={tmp_path / '0-x'}"]
    assert command[-len(last) - 1 :] == ["sora_train.train", *last]


PRINTED = """
import sys
from sora_train.config.hydra import run_hydra
from sora_train.operations import sweep

def told(jobs, *rest):
    for job in jobs:
        print("job", job.command(1)[job.command(1).index("sora_train.train") + 1:])
    sys.exit(0)

sweep.run_jobs = told
run_hydra(lambda config: 0)
"""


@pytest.mark.parametrize("where", ["--config-dir {}", "hydra.searchpath=[file://{}]"])
def test_jobs_find_configurations_where_the_sweep_was_told_they_are(python: str, tmp_path: Path, where: str) -> None:
    """Wherever a flag stands among the overrides, and whatever is in the name of the folder."""
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nsteps: 3\n")
    said = where.format(tmp_path)
    given = ["-m", "hydra/launcher=torchrun", *said.split(" "), "experiment=[demo,mine]", "seed=0,1", "vae.path=x",
             f"run_dir='{tmp_path}/s (1)'"]  # fmt: skip
    done = subprocess.run([python, "-c", PRINTED, *given], cwd=ROOT, capture_output=True, text=True, check=False)
    jobs = [ast.literal_eval(line[4:]) for line in done.stdout.splitlines() if line.startswith("job ")]
    assert len(jobs) == 2, done.stdout + done.stderr
    for number, job in enumerate(jobs):
        assert " ".join(job).startswith(said) and "experiment=[demo,mine]" in job and f"seed={number}" in job
        assert job[-1] == f"run_dir={tmp_path}/s (1)/{number}-seed-{number}"


def test_a_value_that_a_sweep_cannot_read_is_answered_with_how_to_quote_it(python: str, tmp_path: Path) -> None:
    given = ["-m", "seed=0,1", f"run_dir={tmp_path}/s (1)"]
    done = subprocess.run([python, "-c", PRINTED, *given], cwd=ROOT, capture_output=True, text=True, check=False)
    assert f"InputError: run_dir={tmp_path}/s (1): in a sweep Hydra's grammar reads every value: quote" in done.stderr


@pytest.mark.timeout(280)
def test_the_launcher_under_hydra(python: str, tmp_path: Path, corpus: list[str]) -> None:
    """Two jobs from one command: one trains, the other is refused, named, and decides the sweep's code."""
    done = sweep(python, tmp_path, corpus, "hydra.launcher.nproc=1", "steps=2,0")
    assert done.returncode == 2, done.stdout + done.stderr
    trained, refused = (tmp_path / "sweep" / name for name in ("0-steps-2", "1-steps-0"))
    assert json.loads((trained / "exit.json").read_text())["code"] == 0
    assert (trained / "checkpoints/step-00000002/manifest.json").is_file()
    note = json.loads((refused / "exit.json").read_text())
    assert note["code"] == 2 and note["reason"] == "steps=0 must be above 0"
    assert "1-steps-0 ended with code 2: steps=0 must be above 0" in done.stderr
    assert "give the same command again" in done.stderr
    assert "0-steps-2" in done.stdout and "loss" in done.stdout and "done" in done.stdout  # the table
    assert "<polyline" in (tmp_path / "sweep/sweep.html").read_text()
    assert (tmp_path / "sweep/sweep.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.campaign
@pytest.mark.timeout(1200)
def test_two_by_two_at_two_ranks(python: str, tmp_path: Path, corpus: list[str]) -> None:
    """One job is killed: it is named, and the same command takes it up where it was; the others end at once."""
    arguments = ["hydra.launcher.nproc=2", "optim.lr=1e-3,2e-3", "seed=0,1", "steps=40", "checkpoint.every_steps=5"]
    names = [f"{n}-optim.lr-{lr}_seed-{s}" for n, (lr, s) in enumerate(product(("0.001", "0.002"), (0, 1)))]
    victim = tmp_path / "sweep" / names[1]
    with Killer(victim):
        done = sweep(python, tmp_path, corpus, *arguments)
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"{names[1]} ended with code 1: died; see output.log" in done.stderr
    for name in names:
        if name != victim.name:
            assert json.loads((tmp_path / "sweep" / name / "exit.json").read_text())["code"] == 0
    died_at = len(ledger(victim, 0))
    assert 5 <= died_at < 40
    starts = [(tmp_path / "sweep" / name / "metrics.jsonl").read_text() for name in names]

    done = sweep(python, tmp_path, corpus, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ended with code" not in done.stderr
    assert "resumed step-" in (victim / "logs/rank-0.log").read_text()
    for name, before in zip(names, starts, strict=True):
        run = tmp_path / "sweep" / name
        for rank in (0, 1):
            assert [line["step"] for line in ledger(run, rank)] == list(range(1, 41))
        assert name == victim.name or (run / "metrics.jsonl").read_text() == before  # nothing was trained again
    table = done.stdout.split("differences, then last values")[-1]
    assert all(part in table for part in ("optim.lr", "seed", "validation_loss", "done"))
    assert (tmp_path / "sweep/sweep.html").read_text().count("<polyline") >= 4
    assert (tmp_path / "sweep/sweep.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.campaign
@pytest.mark.timeout(1200)
def test_optuna_tries_four(python: str, tmp_path: Path, corpus: list[str]) -> None:
    pytest.importorskip("optuna")
    arguments = ["hydra.sweeper.n_trials=4", "hydra.sweeper.n_jobs=1", "optim.lr=tag(log, interval(1e-4, 1e-2))"]
    done = sweep(python, tmp_path, corpus, "hydra/sweeper=optuna", "hydra.launcher.nproc=2", *arguments, "steps=4")
    assert done.returncode == 0, done.stdout + done.stderr
    runs = [path.parent for path in sorted((tmp_path / "sweep").glob("*/config.yaml"))]
    assert len(runs) == 4 and len({OmegaConf.load(run / "config.yaml").optim.lr for run in runs}) == 4
    assert all(json.loads((run / "exit.json").read_text())["code"] == 0 for run in runs)
    best = OmegaConf.load(tmp_path / "sweep/optimization_results.yaml")
    figures = {OmegaConf.load(run / "config.yaml").optim.lr: read(run).last("validation_loss") for run in runs}
    assert best.best_value == min(figures.values())
    assert figures[best.best_params["optim.lr"]] == best.best_value
    assert (tmp_path / "sweep/sweep.png").read_bytes().startswith(b"\x89PNG")


def sweep(python: str, folder: Path, shards: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Sweep a tiny VAE over real clips, as a user would; the last shard is held out."""
    tiny = [
        "experiment=demo_vae", "vae.widths=[4,4]", "vae.blocks=[0,0]", "threads=1", "data.max_pixels=576",
        "data.max_frames=5", "data.max_tokens=192", "data.workers=1", "logging.writers=[]", "logging.every_steps=1",
        "logging.validate_every=4", "logging.sample_every=0", "logging.peak_tflops=1",
        f"data.sources.demo.shards=[{','.join(shards[:-1])}]", f"data.validation=[{shards[-1]}]",
    ]  # fmt: skip
    command = [python, "-m", "sora_train.train", "-m", "hydra/launcher=torchrun", *tiny, *arguments]
    return subprocess.run(
        [*command, "run_dir=sweep"], capture_output=True, text=True, cwd=folder, timeout=1100,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def ledger(run_dir: Path, rank: int) -> list[dict[str, Any]]:
    path = run_dir / f"ledger/rank-{rank}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class Killer:
    """Kills the main rank of a run as soon as it has a checkpoint."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir, self.end = run_dir, threading.Event()
        self.thread = threading.Thread(target=self.wait)

    def wait(self) -> None:
        while not self.end.wait(0.05):
            if any(self.run_dir.glob("checkpoints/step-*/manifest.json")):
                os.kill(json.loads((self.run_dir / "lock.json").read_text())["pid"], signal.SIGKILL)
                return

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.end.set()
        self.thread.join()
