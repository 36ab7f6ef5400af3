"""Runs as a cluster disturbs them: other launchers, a suspension, a long history behind a resume, another plan.

Kinds of `worker.py`; `test_disturbances.py` looks at the results.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from sora_train.config.schema import Config
from sora_train.data.shards import Shards
from sora_train.training.health.watch import Watch
from tests.faults.bed import Bed, Job, differences, outcome, run, samples_by_step
from tests.faults.trials import stage_for

ROOT = Path(__file__).parents[2]
LINES = 1_000_000  # of a ledger


def suspended(bed: Bed, timeout_s: int = 20) -> object:
    """Two ranks, with all that they started, stand still for one and a half time-outs in the middle of their run."""
    keys = (*stage_for(2), f"guard.timeout_s={timeout_s}")
    if code := run(bed.config("undisturbed", *keys), 2):
        raise RuntimeError(f"the undisturbed run ended with {code}")
    config, run_dir = bed.config("suspended", *keys), bed.run_dir("suspended")
    job = Job(config, 2)
    while not job.poll() and max(samples_by_step(run_dir), default=0) < 5:
        time.sleep(0.01)
    ranks = [psutil.Process(pid) for pid in job.pids]
    everyone = [*ranks, *(child for rank in ranks for child in rank.children(recursive=True))]
    for process in everyone:
        process.suspend()
    reached = max(samples_by_step(run_dir))
    time.sleep(1.5 * timeout_s)
    moved = max(samples_by_step(run_dir)) - reached
    for process in everyone:
        process.resume()
    code = job.wait()
    differing = differences(outcome(bed.run_dir("undisturbed")), outcome(run_dir)) if code == 0 else ["all"]
    return {"code": code, "stopped": len(everyone), "reached": reached, "moved": moved, "differing": differing}


def long_history(bed: Bed, rounds: int = 3) -> object:
    """CPU seconds until the first step of a fresh run, and of resumes with a short ledger and a long one, in turns.

    What a start spends on imports, which these forked ranks don't, is added to each.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", "import sora_train.train, sora_train.operations.build"], cwd=ROOT, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    imports = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    config = bed.config("first", "steps=4")
    if code := run(config, 1):
        raise RuntimeError(f"the first run ended with {code}")
    spent: dict[str, list[float]] = {"fresh": [], "short": [], "long": []}
    for number in range(rounds):
        for name, seconds in spent.items():
            folder = bed.run_dir(f"{name}-{number}")
            if name != "fresh":
                shutil.copytree(bed.run_dir("first"), folder)
            if name == "long":
                _lengthen(
                    folder / "ledger/rank-0.jsonl", '{"step": 1, "position": [0, 0, 0], "samples": [], "refused": []}'
                )
                _lengthen(folder / "metrics.jsonl", '{"step": 1, "time": 0.0, "loss": 1.0}')
            if code := run(bed.config(folder.name, "steps=6"), 1, _note_first_step):
                raise RuntimeError(f"{folder.name} ended with {code}")
            seconds.append(imports + float((folder / "first_step").read_text()))
            ends = (folder / "ledger/rank-0.jsonl").read_text().splitlines()[-2:]
            assert [json.loads(line)["step"] for line in ends] == [5, 6]
            shutil.rmtree(folder)
    return spent


def _lengthen(path: Path, line: str) -> None:
    own = path.read_text()
    with path.open("w") as file:
        file.writelines(f"{line}\n" for _ in range(LINES))
        file.write(own)


def _note_first_step(config: Config, rank: int) -> None:
    """Have a rank write down how much CPU time it has spent when its first step begins."""
    true, began = Watch.phase, time.process_time()

    def entering(self: Watch, name: str, slow: bool = False) -> None:
        note = Path(config.run_dir) / "first_step"
        if name == "forward and backward" and not note.exists():
            note.write_text(str(time.process_time() - began))
        true(self, name, slow)

    Watch.phase = entering  # type: ignore[method-assign]


def other_plan(bed: Bed) -> object:
    """A run goes on inside its second window with other slots, and another with a shard more; how often each sample
    of the first epoch was seen."""
    keys = ("data.window=8", "data.slots=2", "data.max_tokens=8", "checkpoint.every_steps=1")
    found: dict[str, object] = {}
    for name in ("slots", "shards"):
        config = bed.config(name, *keys)
        plan = Shards(config).plan(config).plans[0]
        begun = len(plan.steps(0, 0)) + 1  # one step inside the second window
        if code := run(bed.config(name, *keys, f"steps={begun}"), 1):
            raise RuntimeError(f"{name} ended with {code}")
        if name == "slots":
            changed = bed.config(name, *keys, "data.slots=1", "steps=40")
        else:
            shards = [*config.data.sources["demo"].shards, *config.data.validation]
            more = f"data.sources.demo.shards=[{','.join(shards)}]"
            changed = bed.config(name, *keys, more, "steps=40", leave=("data.sources",))
        code = run(changed, 1)
        lines = (bed.run_dir(name) / "ledger/rank-0.jsonl").read_text().splitlines()
        entries = [json.loads(line) for line in lines]
        seen = Counter(s for entry in entries if entry["position"][0] == 0 for s in entry["samples"])
        said = [line for line in bed.run_dir(name).with_suffix(".out").read_text().splitlines() if "new plan" in line]
        found[name] = {"code": code, "windows": len(plan.windows(0)), "seen": list(seen.items()), "said": said}
    return found


def launchers(bed: Bed) -> object:
    """Two processes under other launchers than torchrun: how the command ended, and the ledgers of both ranks."""
    port = _free_port()
    short = ("steps=2", "deepspeed=zero1")
    commands: dict[str, Sequence[str]] = {
        "deepspeed": ("deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", str(port), "--module"),
        "accelerate": ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
                       "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(port),
                       "--module"),
        "accelerate on CPU": ("accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1",
                              "--mixed_precision", "no", "--dynamo_backend", "no", "--module"),
    }  # fmt: skip
    found: dict[str, object] = {}
    for name, (launcher, *options) in commands.items():
        folder = name.replace(" ", "-")
        command = [sys.executable, "-m", launcher, *options, "sora_train.train", *bed.overrides(folder), *short]
        found[name] = _given([command], bed.run_dir(folder))
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    own = [sys.executable, "-m", "sora_train.train", *bed.overrides("plain"), *short]
    ranks = [["env", f"RANK={rank}", *(f"{key}={value}" for key, value in place.items()), *own] for rank in range(2)]
    found["RANK and WORLD_SIZE"] = _given(ranks, bed.run_dir("plain"))
    return found


def _given(commands: Sequence[Sequence[str]], run_dir: Path) -> dict[str, Any]:
    """Give commands at once; their codes, the end of what they said, and each rank's samples by step."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("TORCHELASTIC", "LOCAL_"))}
    env = kept | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    log = run_dir.with_suffix(".launch")
    with log.open("w") as output:
        processes = [subprocess.Popen(command, cwd=ROOT, env=env, stdout=output, stderr=output) for command in commands]
        codes = [process.wait(timeout=3000) for process in processes]
    ledgers = {
        path.stem: {entry["step"]: entry["samples"] for entry in map(json.loads, path.read_text().splitlines())}
        for path in sorted((run_dir / "ledger").glob("rank-*.jsonl"))
    }
    errors = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
    return {"codes": codes, "ledgers": ledgers, "errors": errors, "said": log.read_text()[-3000:]}


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
