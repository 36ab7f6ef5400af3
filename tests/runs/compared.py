"""Runs whose figures are compared: stages, ranks, adapters, plugins, sources. Each function makes those of a kind."""

from __future__ import annotations

import json
import random
import subprocess
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import webdataset as wds

from sora_train.config.hydra import store_schema
from sora_train.config.registry import load_plugins
from sora_train.config.schema import Config
from sora_train.core.media import encode_mp4
from sora_train.data.index.make import index_shards
from sora_train.training.state.checkpoint_format import kinds_of, latest_intact, load_full, networks_of
from sora_train.training.state.deepspeed_files import read
from sora_train.training.trainer import Trainer
from tests.faults.bed import PYTHON, Bed, Job, differences, losses, outcome, run, samples_by_step
from tests.faults.trials import elastic, kill, stage_for

# eight slots: four passes on each of two ranks; two steps an epoch
_STEADY = ("data.slots=8", "data.max_tokens=4", "checkpoint.every_steps=20")


def whole_matrix(bed: Bed) -> object:
    """Every stage with every accumulation, on one rank and on two."""
    every = [(stage, passes) for stage in range(4) for passes in (1, 2, 4)]
    return _matrix(bed, {1: every, 2: every}, steps=20)


def matrix(bed: Bed) -> object:
    """A sample of it: each stage on two ranks, each accumulation, and both ends on one rank."""
    return _matrix(bed, {1: [(0, 1), (3, 4)], 2: [(0, 4), (1, 2), (2, 1), (3, 2)]}, steps=6)


def _matrix(bed: Bed, wanted: dict[int, list[tuple[int, int]]], steps: int) -> object:
    """Samples and losses of each step, by ranks, ZeRO stage and accumulation; one start per number of ranks."""
    found = {}
    for ranks, ways in wanted.items():
        configs = {
            f"{ranks} rank(s), stage {stage}, accumulation {passes}": bed.config(
                f"{ranks}-{stage}-{passes}",
                f"deepspeed=zero{stage}",
                f"parallel.accumulation={passes}",
                *_STEADY,
                f"steps={steps}",
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


def adapters(bed: Bed, stages: tuple[int, ...] = (0, 3), in_bf16: tuple[int, ...] = (), steps: int = 2) -> object:
    """Two ranks train adapters at ZeRO stages in fp32 and in bf16, and again at stage 3 with a stop halfway."""
    lora = (
        "model.lora.rank=2", "model.lora.alpha=4", "model.lora.targets=[q,v,mlp.2,text_in.0,out.project]",
        "optim.decay_fraction=0", "optim.lr=0.01", "optim.warmup_steps=1", f"steps={steps}",
    )  # fmt: skip
    configs = [bed.config(f"stage-{stage}", *lora, f"deepspeed=zero{stage}") for stage in stages]
    configs += [
        bed.config(
            f"bf16-{stage}", *lora, f"deepspeed=zero{stage}", "precision=bf16", f"logging.validate_every={steps}"
        )
        for stage in in_bf16
    ]
    configs += [bed.config("resumed", *lora, "deepspeed=zero3", f"steps={end}") for end in (steps // 2, steps)]
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
    return adapters(bed, (0, 1, 2, 3), (0, 3), 4)


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
        [PYTHON, "-m", "sora_train.import_deepspeed", f"checkpoint={bed.run_dir('stage-3')}/theirs",
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


def plugs(bed: Bed) -> object:
    """A method of two engines and a family of our tests: every stage, and a kill inside a save."""
    load_plugins(["tests.plugs.distil", "tests.plugs.mixer"])
    store_schema()
    mine = ("plugins=[tests.plugs.distil,tests.plugs.mixer]", "method=distil")
    short = (*mine, "steps=4", "optim.decay_fraction=0", "+method_options.share=0.5")
    configs = {
        f"distil-{stage}": bed.config(f"distil-{stage}", f"deepspeed=zero{stage}", *short) for stage in (1, 2, 3)
    }
    shape = ("model.width=16", "model.depth=1", "model.heads=2", "model.ffn=32", "model.patch=2")
    family = ("model=mixer", *shape, "steps=4")
    configs["mixer-1"] = bed.config("mixer-1", "deepspeed=zero1", short[0], *family, leave=("model",))
    first, *then = configs.values()
    job = Job(first, 2, then=then)
    if code := job.wait():
        raise RuntimeError(f"ended with {code}:\n{job.log.read_text()[-4000:]}")
    reference = outcome(bed.run_dir("distil-1"))
    wrong = kill(bed, "killed", random.Random(3), reference, 2, (True,), "deepspeed=zero1", *short)
    newest = latest_intact(bed.run_dir("killed") / "checkpoints")
    return {
        "losses": {name: list(losses(Path(config.run_dir)).values()) for name, config in configs.items()},
        "kill": wrong, "torn saves": bed.facts["torn"], "terms": _terms(bed.run_dir("distil-1")),
        "tensors": {network: kinds_of(newest, network) for network in networks_of(newest)},
    }  # fmt: skip


def _terms(run_dir: Path) -> list[float]:
    """Share of the plugin's own term in the loss, in each logged step."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["loss_term/distance"] / line["loss"] for line in lines if "loss" in line]


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
