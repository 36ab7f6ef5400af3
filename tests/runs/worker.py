"""Server of real runs of one and two ranks. It has imported what a run imports, and forks a process for each request.

A line of its standard input is a request: `{"kind": KIND, "folder": FOLDER, "shards": [SHARD, ...]}`. The process
writes what came of the runs to FOLDER.json; the server answers with `ended with CODE`. The tests beside this file look
at the results.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import webdataset as wds
from safetensors.torch import load_file

from sora_train import evaluate, sample
from sora_train.config.hydra import store_schema
from sora_train.config.registry import load_plugins
from sora_train.config.schema import Config
from sora_train.core.media import encode_mp4
from sora_train.data.index.make import index_shards
from sora_train.generation.evaluator import Evaluator
from sora_train.methods.diffusion.learner import DiffusionLearner
from sora_train.release.folder import Settings, make
from sora_train.training.engine.power_ema import combined
from sora_train.training.state.checkpoint import kinds_of, latest_intact, load_full, networks_of
from sora_train.training.state.deepspeed_files import read
from sora_train.training.trainer import Trainer
from tests.faults.bed import Bed, Job, differences, lines_of, losses, outcome, run, samples_by_step
from tests.faults.sabotage import fill_disk, signal_in
from tests.faults.trials import elastic, kill, stage_for
from tests.runs.degrees import degrees, failing_part
from tests.runs.disturbances import launchers, long_history, other_plan, suspended
from tests.runs.late_rank import late_rank

AVERAGES = ("optim.ema_lengths=[0.05,0.1]", "checkpoint.snapshot_every=4")
# eight slots: four passes on each of two ranks; two steps an epoch
_STEADY = ("data.slots=8", "data.max_tokens=4", "checkpoint.every_steps=20")


def whole_matrix(bed: Bed) -> object:
    """Every stage with every accumulation, on one rank and on two."""
    every = [(stage, passes) for stage in range(4) for passes in (1, 2, 4)]
    return _matrix(bed, {1: every, 2: every})


def matrix(bed: Bed) -> object:
    """A sample of it: each stage on two ranks, each accumulation, and both ends on one rank."""
    return _matrix(bed, {1: [(0, 1), (3, 4)], 2: [(0, 4), (1, 2), (2, 1), (3, 2)]})


def _matrix(bed: Bed, wanted: dict[int, list[tuple[int, int]]]) -> object:
    """Samples and losses of each step, by ranks, ZeRO stage and accumulation; one start per number of ranks."""
    found = {}
    for ranks, ways in wanted.items():
        configs = {
            f"{ranks} rank(s), stage {stage}, accumulation {passes}": bed.config(
                f"{ranks}-{stage}-{passes}", f"deepspeed=zero{stage}", f"parallel.accumulation={passes}", *_STEADY
            )
            for stage, passes in ways
        }
        first, *then = configs.values()
        job = Job(first, ranks, then=then)
        if code := job.wait():
            raise RuntimeError(f"{ranks} rank(s) ended with {code}:\n{job.log.read_text()[-4000:]}")
        for name, config in configs.items():
            folder = Path(config.run_dir)
            found[name] = {"samples": samples_by_step(folder), "losses": losses(folder)}
    return found


def kills(bed: Bed) -> object:
    """Two kills of one run of two ranks, one of them inside a save."""
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
    config = bed.config("steady", "deepspeed=zero0")
    if code := run(config, 1):
        raise RuntimeError(f"the undisturbed run ended with {code}; see {config.run_dir}")
    folder = bed.run_dir("steady")
    return {"wrong": elastic(bed, "moved", ((2, 1), (1, 3), (1, 0)), folder), "steps": len(losses(folder))}


def debugs(bed: Bed) -> object:
    """Two ranks run each file of conf/debug (`overfit` for fewer steps), then a run in which rank 1's memory ends."""
    free = ("steps=", "logging.", "checkpoint.", "flow.caption")  # what the files set
    tiny = ("logging.peak_tflops=1", "logging.validation_clips=2")
    configs = {
        "limit": bed.config("limit", "debug=limit", *tiny, leave=free),
        "overfit": bed.config("overfit", "debug=overfit", "steps=6", *tiny, leave=free),
        "profile": bed.config("profile", "debug=profile", *tiny, leave=free),
        "memory": bed.config("memory"),
    }
    first, *then = configs.values()
    job = Job(first, 2, _run_out, then=then)
    job.wait()
    found: dict[str, object] = {"codes": [job.codes[rank] for rank in (0, 1)], "output": job.log.read_text()[-4000:]}
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
        [sys.executable, "-m", "sora_train.export", f"run_dir={second.run_dir}", f"out={bed.folder}/out",
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


def adapters(bed: Bed, stages: tuple[int, ...] = (0, 3), in_bf16: tuple[int, ...] = (3,)) -> object:
    """Two ranks train adapters at ZeRO stages, in bf16, and again at stage 3 with a stop halfway."""
    lora = (
        "model.lora.rank=2", "model.lora.alpha=4", "model.lora.targets=[q,v,mlp.2,text_in.0,out.project]",
        "optim.decay_fraction=0", "optim.lr=0.01", "optim.warmup_steps=1", "steps=4",
    )  # fmt: skip
    configs = [bed.config(f"stage-{stage}", *lora, f"deepspeed=zero{stage}") for stage in stages]
    configs += [
        bed.config(f"bf16-{stage}", *lora, f"deepspeed=zero{stage}", "precision=bf16", "logging.validate_every=4")
        for stage in in_bf16
    ]
    configs += [bed.config("resumed", *lora, "deepspeed=zero3", f"steps={steps}") for steps in (2, 4)]
    first, *then = configs
    job = Job(first, 2, then=then)
    if code := job.wait(timeout_s=3000):
        raise RuntimeError(f"ended with {code}:\n{job.log.read_text()[-4000:]}")
    found: dict[str, object] = {}
    for name in dict.fromkeys(Path(config.run_dir).name for config in configs):
        newest = latest_intact(bed.run_dir(name) / "checkpoints")
        found[name] = {
            "losses": losses(bed.run_dir(name)),
            "tensors": {kind: sorted(load_full(newest, kind)) for kind in kinds_of(newest)},
            "moved": max(float(w.abs().max()) for n, w in load_full(newest, "ema").items() if "lora_B" in n),
        }
    same = differences(outcome(bed.run_dir("stage-3")), outcome(bed.run_dir("resumed")))
    return {"runs": found, "resumed and undisturbed differ in": same}


def all_adapters(bed: Bed) -> object:
    """The same at every stage."""
    return adapters(bed, (0, 1, 2, 3), (0, 3))


def minute(bed: Bed, side: int = 24) -> object:
    """A clip of 60 s at 24 frames a second, whole, in full attention: on one rank, and shared out over four."""
    path = bed.folder / "minute.tar"
    places = np.arange(60 * 24 + 1) // 8 % (side - 8)
    frames = np.full((len(places), side, side, 3), 90, np.uint8)
    for frame, place in zip(frames, places, strict=True):
        frame[4:12, place : place + 8] = 40 + place * 8, 200, 60
    with wds.TarWriter(str(path)) as tar:
        tar.write({"__key__": "0", "txt": b"a block that comes and goes for a minute", "mp4": encode_mp4(frames, 24.0)})
    index_shards([str(path)], workers=1)
    keys = (
        f"data.sources.demo.shards=[{path}]", "data.fps=24", f"data.max_frames={len(frames)}", "data.slots=1",
        f"data.max_pixels={side**2}", f"data.max_tokens={len(frames) * side**2 // 64}", "model.width=32",
        "model.heads=4", "model.depth=2", "steps=2", "optim.decay_fraction=0", "deepspeed=zero2",
    )  # fmt: skip
    found: dict[str, object] = {}
    for ranks in (1, 4):
        config = bed.config(f"minute-{ranks}", *keys, f"parallel.sequence={ranks}")
        job = Job(config, ranks)
        if code := job.wait(timeout_s=3000):
            raise RuntimeError(f"{ranks} rank(s) ended with {code}:\n{job.log.read_text()[-4000:]}")
        lines = [json.loads(line) for line in (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()]
        found[str(ranks)] = [{k: line[k] for k in ("loss", "grad_norm", "tokens")} for line in lines if "loss" in line]
    return found


def large_minute(bed: Bed) -> object:
    """The same with four times as many tokens."""
    return minute(bed, side=48)


def imports(bed: Bed) -> object:
    """Two ranks train at ZeRO 1, 2, 3 and 1 in bf16, and DeepSpeed saves beside us; both read back and compared."""
    stages = {"1": (), "2": (), "3": (), "1-bf16": ("precision=bf16", "+deepspeed.data_types.grad_accum_dtype=fp32")}
    configs = {
        name: bed.config(f"stage-{name}", "steps=3", f"deepspeed=zero{name[0]}", *more) for name, more in stages.items()
    }
    first, *then = configs.values()
    job = Job(first, 2, _save_theirs, then=then)
    if code := job.wait():
        raise RuntimeError(f"ended with {code}:\n{job.log.read_text()[-4000:]}")
    found: dict[str, object] = {}
    for name, config in configs.items():
        folder = Path(config.run_dir)
        theirs, newest = read(folder / "theirs"), latest_intact(folder / "checkpoints")
        wrong, count = [], 0
        for kind, tensors in theirs.tensors.items():
            ours = load_full(newest, kind)
            wrong += [f"{kind}/{n}" for n in ours.keys() ^ tensors.keys()]
            wrong += [f"{kind}/{n}" for n in ours.keys() & tensors.keys() if not torch.equal(ours[n], tensors[n])]
            count += len(tensors)
        about = [theirs.steps, theirs.applied, theirs.ranks, theirs.stage]
        found[name] = {"wrong": wrong, "count": count, "about": about}
    done = subprocess.run(
        [sys.executable, "-m", "sora_train.import_deepspeed", f"checkpoint={bed.run_dir('stage-3')}/theirs",
         f"run_dir={bed.run_dir('taken')}"], capture_output=True, text=True, check=False,
    )  # fmt: skip
    taken = bed.config("taken", "steps=5", "deepspeed=zero0")
    code = run(taken, 1)
    return {
        "saved": found,
        "command": [done.returncode, done.stdout, done.stderr[-2000:]],
        "code": code,
        "output": Path(taken.run_dir).with_suffix(".out").read_text(),
        "losses": losses(Path(taken.run_dir)),
    }


def _save_theirs(config: Config, rank: int) -> None:
    """Have DeepSpeed save as well at the end of a run."""
    true = getattr(Trainer.leave, "true", Trainer.leave)  # one process makes several runs

    def leaving(self: Trainer, code: int, reason: str) -> int:
        self.engines.first.engine.save_checkpoint(str(self.run_dir / "theirs"))
        return int(true(self, code, reason))

    leaving.true = true  # type: ignore[attr-defined]
    Trainer.leave = leaving  # type: ignore[method-assign]


def side_tables(bed: Bed) -> object:
    """A score filters and weights runs of one and two ranks; then the table changes, and the run of two goes on."""
    path = bed.folder / "scores.parquet"
    scores = [float(n % 4) for n in range(24)]
    keys = [f"{n:05d}" for n in range(24)]
    pq.write_table(pa.table({"key": keys, "score": scores}), path)
    asked = (f"data.side_tables=[{path}]", "data.filter='score > 0'", "data.weight=score")
    found: dict[str, object] = {}
    for ranks in (1, 2):
        config = bed.config(f"scored-{ranks}", *asked, "steps=12")
        job = Job(config, ranks)
        if code := job.wait():
            raise RuntimeError(f"{ranks} rank(s) ended with {code}:\n{job.log.read_text()[-4000:]}")
        folder = Path(config.run_dir) / "ledger"
        entries = [json.loads(line) for file in folder.glob("rank-*.jsonl") for line in file.read_text().splitlines()]
        first = [sample for entry in entries if entry["position"][0] == 0 for sample in entry["samples"]]
        found[str(ranks)] = {
            "samples": samples_by_step(Path(config.run_dir)), "losses": losses(Path(config.run_dir)),
            "first epoch": {n: first.count(n) for n in range(16)}, "epochs": max(e["position"][0] for e in entries) + 1,
        }  # fmt: skip
    pq.write_table(pa.table({"key": keys, "score": scores[::-1]}), path)
    changed = bed.config("scored-2", *asked, "steps=14")
    codes = [run(changed, 2), run(bed.config("missing", *asked, f"data.side_tables=[{path}.gone]"), 1)]
    reason = json.loads((bed.run_dir("missing") / "exit.json").read_text())["reason"]
    return found | {"codes": codes, "output": Path(changed.run_dir).with_suffix(".out").read_text(), "reason": reason}


def looks(bed: Bed) -> object:
    """Runs of two ranks with and without evaluations under way, one that shares out the tokens, one that is killed, and
    one of one rank."""
    look = ("logging.evaluate_every=4", "logging.evaluate_clips=3", "logging.metrics=[quick]", "checkpoint.best=ssim")
    plain, two, shared, three = (
        bed.config(name, "steps=8", f"deepspeed=zero{stage}", *more)
        for name, stage, more in (
            ("plain", 2, ()), ("two", 2, look), ("shared", 2, ("parallel.sequence=2", *look)), ("three", 3, look),
        )
    )  # fmt: skip
    one = bed.config("one", "steps=8", "deepspeed=zero2", *look)
    for job in (Job(plain, 2, then=(two, shared, three)), Job(one, 1)):
        if code := job.wait():
            raise RuntimeError(f"ended with {code}:\n{job.log.read_text()[-4000:]}")
    reference = outcome(bed.run_dir("two"))
    wrong = kill(bed, "killed", random.Random(3), reference, 2, (True,), "steps=8", "deepspeed=zero2", *look)
    return {
        "kill": wrong, "changed": differences(outcome(bed.run_dir("plain")), reference),
        "figures": {name: _figures(bed.run_dir(name)) for name in ("one", "two", "shared", "three", "killed")},
    }  # fmt: skip


def _figures(run_dir: Path) -> dict[int, list[dict[str, float]]]:
    """The figures of a run's evaluations by step; several of a step that was evaluated again."""
    found: dict[int, list[dict[str, float]]] = {}
    for line in lines_of(run_dir / "metrics.jsonl"):
        if figures := {key: value for key, value in line.items() if key.startswith("evaluation/")}:
            found.setdefault(line["step"], []).append(figures)
    return found


def evaluations(bed: Bed) -> object:
    """A run is evaluated by one rank, by two, and by one that is killed in its second unit and started again."""
    config = bed.config("judged", "steps=4")
    if code := run(config, 2):
        raise RuntimeError(f"the run ended with {code}; see {config.run_dir}")
    folder, shards = Path(config.run_dir), [*config.data.sources["demo"].shards, *config.data.validation]
    found: dict[str, object] = {}
    for name, ranks, ends in (("one", 1, [0]), ("two", 2, [0, 0]), ("killed", 1, [-signal.SIGKILL, 0])):
        shutil.rmtree(folder / "evaluation", ignore_errors=True)
        codes, units = [], set()
        for end in ends[: None if ranks == 1 else 1]:
            job = Job(config, ranks, _die_in_second_unit if end else None, command=partial(_evaluate, shards))
            job.wait()
            codes += [job.codes[rank] for rank in range(ranks)]
            units |= {(path.name, path.stat().st_mtime_ns) for path in folder.glob("evaluation/*/unit-*.json")}
        said = json.loads((folder / "evaluation.json").read_text())
        found[name] = {"codes": codes, "ends": ends, "units": sorted(name for name, _ in units), "said": said}
    return found


def _evaluate(shards: list[str], config: Config) -> int:
    sys.argv = ["evaluate", f"run_dir={config.run_dir}", f"shards=[{','.join(shards)}]", "metrics=quick"]
    return evaluate.main()


def _die_in_second_unit(config: Config, rank: int) -> None:
    true = Evaluator._judge_unit

    def judging(self: Evaluator, unit: Any, task: Any, number: int) -> Any:
        if number == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return true(self, unit, task, number)

    Evaluator._judge_unit = judging  # type: ignore[method-assign]


def refusals(bed: Bed) -> object:
    """Two ranks sample two prompts together, the first of which the guard refuses."""
    config = bed.config("model", "steps=2")
    if code := run(config, 1):
        raise RuntimeError(f"the run ended with {code}; see {config.run_dir}")
    release, prompts, out = (bed.folder / name for name in ("release", "prompts.txt", "made"))
    make(release, Settings("Test Lab", sign=False, mark="none"))
    (release / "words.txt").write_text("tea: teapot\n")
    prompts.write_text("a teapot\na block\n")

    def ask(config: Config) -> int:
        sys.argv = ["sample", f"run_dir={config.run_dir}", f"prompts={prompts}", f"out={out}", f"release={release}"]
        return sample.main()

    job = Job(config, 2, command=ask)
    job.wait()
    return {
        "codes": [job.codes[rank] for rank in (0, 1)], "made": sorted(path.name for path in out.glob("*.mp4")),
        "refused": lines_of(release / "refusals.jsonl"), "output": job.log.read_text()[-4000:],
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


def plugs(bed: Bed) -> object:
    """A method of two engines and a family of our tests: every stage, and a kill inside a save."""
    load_plugins(["tests.plugs.distil", "tests.plugs.mixer"])
    store_schema()
    mine = ("plugins=[tests.plugs.distil,tests.plugs.mixer]", "method=distil")
    short = (*mine, "steps=6", "optim.decay_fraction=0")
    configs = {
        f"distil-{stage}": bed.config(f"distil-{stage}", f"deepspeed=zero{stage}", *short) for stage in (1, 2, 3)
    }
    shape = ("model.width=16", "model.depth=1", "model.heads=2", "model.ffn=32", "model.patch=2")
    family = ("model=mixer", *shape, "steps=6")
    configs["mixer-3"] = bed.config("mixer-3", "deepspeed=zero3", short[0], *family, leave=("model",))
    first, *then = configs.values()
    job = Job(first, 2, then=then)
    if code := job.wait():
        raise RuntimeError(f"ended with {code}:\n{job.log.read_text()[-4000:]}")
    reference = outcome(bed.run_dir("distil-3"))
    wrong = kill(bed, "killed", random.Random(3), reference, 2, (True,), "deepspeed=zero3", *short)
    newest = latest_intact(bed.run_dir("killed") / "checkpoints")
    return {
        "losses": {name: list(losses(Path(config.run_dir)).values()) for name, config in configs.items()},
        "kill": wrong, "torn saves": bed.facts["torn"],
        "tensors": {network: kinds_of(newest, network) for network in networks_of(newest)},
    }  # fmt: skip


def moved_plugs(bed: Bed) -> object:
    """The method of two engines: two kills, and moves to other ranks and stages."""
    load_plugins(["tests.plugs.distil", "tests.plugs.mixer"])
    store_schema()
    mine = ("plugins=[tests.plugs.distil,tests.plugs.mixer]", "method=distil")
    undisturbed = bed.config("undisturbed", *mine, *stage_for(2))
    if code := run(undisturbed, 2):
        raise RuntimeError(f"the undisturbed run ended with {code}; see {undisturbed.run_dir}")
    reference = outcome(bed.run_dir("undisturbed"))
    return {
        "kill": kill(bed, "killed", random.Random(3), reference, 2, (True, False), *mine, *stage_for(2)),
        "move": elastic(bed, "moved", ((2, 1), (1, 3), (2, 2)), bed.run_dir("undisturbed"), *mine),
    }  # fmt: skip


KINDS: dict[str, Callable[[Bed], object]] = {
    "matrix": matrix, "whole matrix": whole_matrix, "kills": kills, "moves": moves, "mirrored": mirrored,
    "debugs": debugs, "plugs": plugs, "moved plugs": moved_plugs, "adapters": adapters, "all adapters": all_adapters,
    "minute": minute, "large minute": large_minute, "imports": imports, "side tables": side_tables,
    "full disk": full_disk, "suspended": suspended, "long history": long_history, "other plan": other_plan,
    "launchers": launchers,
    "degrees": degrees, "failing part": failing_part, "late rank": late_rank,
    "looks": looks, "evaluations": evaluations, "refusals": refusals,
}  # fmt: skip


def answer(kind: str, folder: Path, shards: list[str]) -> int:
    """Make the runs of a kind in a process of their own; returns its exit code."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = 1
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it doesn't outlive the server
        output = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(output, 1)
        os.dup2(output, 2)
        made = KINDS[kind](Bed(folder, steps=20, shards=shards))
        folder.with_suffix(".json").write_text(json.dumps(made))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def serve(folder: Path) -> None:
    """Import what a run imports, then answer requests until the end of standard input."""
    Bed(folder / "bed").warm()
    for line in sys.stdin:
        asked = json.loads(line)
        print(f"ended with {answer(asked['kind'], Path(asked['folder']), asked['shards'])}", flush=True)


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
