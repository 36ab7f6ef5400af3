"""Runs that are evaluated, by themselves or by ranks together, and a guard asked by two ranks."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

from sora_train import evaluate, sample
from sora_train.config.schema import Config
from sora_train.generation.evaluator import Evaluator
from sora_train.release.folder import Settings, make
from tests.faults.bed import Bed, Job, differences, lines_of, outcome, run
from tests.faults.trials import kill


def looks(bed: Bed) -> object:
    """Runs of two ranks with and without evaluations under way, one that shares out the tokens, one that is killed, and
    one of one rank."""
    look = ("logging.evaluate_every=2", "logging.evaluate_clips=3", "logging.metrics=[quick]", "checkpoint.best=ssim")
    plain, two, shared, three = (
        bed.config(name, "steps=4", f"deepspeed=zero{stage}", *more)
        for name, stage, more in (
            ("plain", 2, ()), ("two", 2, look), ("shared", 2, ("parallel.sequence=2", *look)), ("three", 3, look),
        )
    )  # fmt: skip
    one = bed.config("one", "steps=4", "deepspeed=zero2", *look)
    for job in (Job(plain, 2, then=(two, shared, three)), Job(one, 1)):
        if code := job.wait():
            raise RuntimeError(f"ended with {code}:\n{job.log.read_text()[-4000:]}")
    reference = outcome(bed.run_dir("two"))
    wrong = kill(bed, "killed", random.Random(3), reference, 2, (True,), "steps=4", "deepspeed=zero2", *look)
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
    make(release, Settings("Test Lab", sign=False, mark="none"), lambda folder: None)
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
