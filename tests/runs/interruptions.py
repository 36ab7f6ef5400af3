"""Runs that are killed, moved, mirrored, or short of disk or memory. Each function makes those of a kind."""

from __future__ import annotations

import errno
import json
import random
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from sora_train.config.schema import Config
from sora_train.methods.diffusion.learner import DiffusionLearner
from sora_train.training.engine.power_ema import combined
from sora_train.training.state.checkpoint_format import latest_intact, load_full
from tests.faults.bed import PYTHON, Bed, Job, losses, outcome, run, samples_by_step
from tests.faults.sabotage import fill_disk, signal_in
from tests.faults.trials import elastic, kill, stage_for

AVERAGES = ("optim.ema_lengths=[0.05,0.1]", "checkpoint.snapshot_every=4")


def kills(bed: Bed) -> object:
    """Two kills of one run of two ranks, one of them inside a save."""
    bed.steps = 8
    config = bed.config("undisturbed", *stage_for(2))
    if code := run(config, 2):
        raise RuntimeError(f"the undisturbed run ended with {code}; see {config.run_dir}")
    reference = outcome(bed.run_dir("undisturbed"))
    inside = (False, True)
    wrong = kill(bed, "killed", random.Random(7), reference, 2, inside, *stage_for(2))
    compared = {name: len(values) for name, values in reference.items()}
    return {"wrong": wrong, "torn saves": bed.facts["torn"], "compared": compared}


def moves(bed: Bed) -> object:
    """Two ranks at stage 1, one at stage 3, one at stage 0, each going on from the one before."""
    bed.steps = 8
    config = bed.config("steady", "deepspeed=zero0")
    if code := run(config, 1):
        raise RuntimeError(f"the undisturbed run ended with {code}; see {config.run_dir}")
    folder = bed.run_dir("steady")
    return {"wrong": elastic(bed, "moved", ((2, 1), (1, 3), (1, 0)), folder), "steps": len(losses(folder))}


def averages(run_dir: Path) -> dict[str, float]:
    """The sum of squares of each of a run's last averages, and of one that its snapshots make."""
    newest = latest_intact(run_dir / "checkpoints")
    kinds = {kind: load_full(newest, kind) for kind in ("ema", "ema-0.05", "ema-0.1")}
    kinds["made"] = combined(run_dir, 0.1)[0]
    return {kind: sum(float(v.double().square().sum()) for v in full.values()) for kind, full in kinds.items()}


def mirrored(bed: Bed) -> object:
    """A run of two ranks with a mirror, and its last two steps again in an empty folder, from the mirror, on one."""
    mirror = bed.folder / "elsewhere"
    url = (f"checkpoint.mirror=file://{mirror}", *AVERAGES)
    first = bed.config("first", *url, "deepspeed=zero2")
    if code := run(first, 2):
        raise RuntimeError(f"the run with a mirror ended with {code}; see {first.run_dir}")
    held = sorted(path.name for path in mirror.iterdir())
    last = Path(first.run_dir) / "checkpoints" / "step-00000020"
    same = all(path.read_bytes() == (mirror / last.name / path.name).read_bytes() for path in last.iterdir())
    (mirror / last.name / "manifest.json").unlink()  # as if the machine had been lost inside the last upload
    second = bed.config("second", *url, "deepspeed=zero3")
    codes = [run(second, 1), run(first, 2)]
    ours, theirs = outcome(Path(first.run_dir)), outcome(Path(second.run_dir))
    figures = [json.loads(line) for line in (Path(first.run_dir) / "metrics.jsonl").read_text().splitlines()]
    exported = subprocess.run(
        [PYTHON, "-m", "sora_train.export", f"run_dir={second.run_dir}", f"out={bed.folder}/out",
         "ema_length=0.1"], capture_output=True, text=True, check=False,
    )  # fmt: skip
    kept = load_full(latest_intact(Path(second.run_dir) / "checkpoints"), "ema-0.1")
    made = load_file(bed.folder / "out" / "model.safetensors") if exported.returncode == 0 else {}
    off = max((float((made[n] - w).norm() / w.norm()) for n, w in kept.items() if n in made), default=9.0)
    snapshots = [
        sorted(path.name for path in folder.glob("step-*"))
        for folder in (mirror / "snapshots", Path(first.run_dir) / "snapshots", Path(second.run_dir) / "snapshots")
    ]
    return {
        "exported": [exported.returncode, exported.stdout, exported.stderr[-2000:], made.keys() == kept.keys(), off],
        "snapshots": snapshots,
        "held": held, "same": same, "codes": codes, "held again": sorted(path.name for path in mirror.iterdir()),
        "samples": [theirs["samples"], {step: ours["samples"][step] for step in (19, 20)}],
        "averages": [averages(Path(name)) for name in (second.run_dir, first.run_dir)],
        "losses": [losses(Path(name)) for name in (second.run_dir, first.run_dir)],
        "failed": [line["failed_uploads"] for line in figures if "failed_uploads" in line],
        "refused": json.loads((Path(first.run_dir) / "exit.json").read_text())["reason"],
    }  # fmt: skip


def full_disk(bed: Bed) -> object:
    """Two ranks on a disk that is full: at the save of a stop, at two starts, and no more."""
    config = bed.config("full", "steps=10", "checkpoint.every_steps=4")

    def stopped(mine: Config, rank: int) -> None:
        signal_in("optimizer step", 6, signal.SIGTERM)
        if rank == 0:
            fill_disk(4, 1 << 30)  # behind what the save of step 4 writes

    def started(mine: Config, rank: int) -> None:
        usage = shutil.disk_usage("/")._replace(free=1 << 20)
        shutil.disk_usage = lambda path: usage

    def barred(mine: Config, rank: int) -> None:
        true = Path.write_text

        def full(self: Path, *more: Any, **named: Any) -> int:
            if self.name == "starts.json":
                raise OSError(errno.ENOSPC, "No space left on device", str(self))
            return true(self, *more, **named)

        Path.write_text = full  # type: ignore[method-assign]

    ends = []
    for sabotage in (stopped, started, barred, None):
        code = run(config, 2, sabotage)
        ends.append([code, json.loads((Path(config.run_dir) / "exit.json").read_text())["reason"]])
    output = Path(config.run_dir).with_suffix(".out").read_text()
    return {"ends": ends, "steps": list(samples_by_step(Path(config.run_dir))), "output": output}


def debugs(bed: Bed) -> object:
    """Each file of conf/debug (`overfit` for fewer steps), then a run of two ranks in which rank 1's memory ends."""
    free = ("steps=", "logging.", "checkpoint.", "flow.caption")  # what the files set
    tiny = ("logging.peak_tflops=1", "logging.validation_clips=2")
    configs = {
        "limit": bed.config("limit", "debug=limit", *tiny, leave=free),
        "overfit": bed.config("overfit", "debug=overfit", "steps=6", *tiny, leave=free),
        "profile": bed.config("profile", "debug=profile", *tiny, leave=free),
        "memory": bed.config("memory"),
    }
    alone = Job(configs["limit"], 1, then=[configs["overfit"]])
    job = Job(configs["profile"], 2, _run_out, then=[configs["memory"]])
    code = alone.wait()
    job.wait()
    found: dict[str, object] = {"codes": [code, job.codes[0], job.codes[1]], "output": job.log.read_text()[-4000:]}
    for name, config in configs.items():
        folder = Path(config.run_dir)
        files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
        ledger = samples_by_step(folder) if (folder / "ledger").is_dir() else {}
        distinct = len({sample for samples in ledger.values() for sample in samples})
        exit_note = json.loads((folder / "exit.json").read_text())
        found[name] = {"files": files, "exit": exit_note, "losses": losses(folder), "samples": distinct}
    return found


def _run_out(config: Config, rank: int) -> None:
    """In the run `memory`, have rank 1 ask for a million GiB in its third step."""
    if Path(config.run_dir).name != "memory" or rank != 1:
        return
    true, count = DiffusionLearner.loss, [0]

    def asking(self: DiffusionLearner, *arguments: Any) -> Any:
        count[0] += 1
        if count[0] > 4:  # two packs a step
            torch.empty(1 << 50)
        return true(self, *arguments)

    DiffusionLearner.loss = asking  # type: ignore[method-assign]
