"""Numbers of shards, ranks and workers that don't go into one another, each as a real run with validation.

    python -m tests.faults.shard_counts [shards=9] [ranks=4] [workers=3] [folder=DIR] [write=true]

Every combination of 1 to `shards` shards (of one to three images each), 1 to `ranks` ranks and 0 to `workers` decode
processes trains for an epoch and a step on four slots, and validates on the same shards. All ranks must take the same
steps, the epoch must have each sample once, and the validation loss must be the same whatever the number of ranks.
A run without workers must be refused within five seconds of CPU. The ranks of one number are started once and make all
of its runs, one after the other; a rank that waits for ever is killed, and its run named.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.report import command
from benchmarks.report import write as write_table
from sora_train.config.schema import Config
from sora_train.core.cli import BAD_INPUT, InputError, run
from sora_train.core.options import options
from sora_train.data.index.make import index_shards
from sora_train.data.shards import Shards
from tests.faults.bed import Bed, Job
from tests.faults.small_data import ledger, picture, sources, write
from tests.load import cpu_s

_ROOT = Path(__file__).parents[2]
_CASE_S = 120.0  # a run that takes longer hangs
_REFUSED_S = 5.0


@dataclass
class Options:
    """Options: the range of each number, and the folder."""

    shards: int = 9
    ranks: int = 4
    workers: int = 3
    folder: str = ""
    write: bool = False  # the table into docs/results.md


@dataclass
class Case:
    """One combination, and the steps that its epoch has."""

    shards: int
    ranks: int
    workers: int
    config: Config
    samples: int
    epoch: int

    def wrong(self, losses: dict[int, float]) -> str:
        """Faults found in its run; `losses` has the validation loss of each number of shards."""
        run_dir = Path(self.config.run_dir)
        try:
            code = json.loads((run_dir / "exit.json").read_text())["code"]
            lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
            loss = next(line["validation_loss"] for line in lines if "validation_loss" in line)
        except (OSError, ValueError, StopIteration):
            return "it did not come to its end"
        steps: dict[int, list[Any]] = {}
        for rank in range(self.ranks):
            mine = (run_dir / "ledger" / f"rank-{rank}.jsonl").read_text().splitlines()
            steps[rank] = [json.loads(line)["position"] for line in mine]
        if code or any(taken != steps[0] for taken in steps.values()) or len(steps[0]) != self.epoch + 1:
            return f"ended with {code} after {[len(taken) for taken in steps.values()]} steps of {self.epoch + 1}"
        seen = Counter(row for line in ledger(run_dir) if line["position"][0] == 0 for row in line["samples"])
        if seen != Counter(range(self.samples)):
            return f"the epoch had {dict(seen)} of {self.samples} samples"
        if abs(loss / losses.setdefault(self.shards, loss) - 1) > 1e-5:
            return f"the validation loss is {loss}, with other numbers of ranks or workers {losses[self.shards]}"
        return ""


def refused(bed: Bed, command: bool) -> tuple[float, str]:
    """Time until a run without workers is refused, and what was wrong with that; `command`: as a command."""
    began, spent = time.monotonic(), cpu_s()
    said = ""
    if command:
        arguments = [*bed.overrides("refused"), "data.workers=0"]
        done = subprocess.run(
            [sys.executable, "-m", "sora_train.train", *arguments],
            cwd=_ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        said = done.stderr if done.returncode == BAD_INPUT else f"ended with {done.returncode}"
    else:
        try:
            bed.config("refused", "data.workers=0")
        except InputError as error:
            said = str(error)
    seconds, spent = time.monotonic() - began, cpu_s() - spent
    wrong = "" if "data.workers=0 must be above 0" in said else f"not refused: {said[-300:]}"
    return seconds, wrong or ("" if spent < _REFUSED_S else f"refused only after {spent:.1f} s of CPU")


def cases(bed: Bed, shards: list[str], ranks: int, workers: int) -> list[Case]:
    """The runs of one number of ranks."""
    found = []
    for count in range(1, len(shards) + 1):
        for processes in range(1, workers + 1):
            listed = shards[:count]
            config = bed.config(
                f"{count}-{ranks}-{processes}", sources(listed), f"data.validation=[{','.join(listed)}]",
                f"data.workers={processes}", "data.max_tokens=4", "logging.validate_every=1000",
                "logging.validation_clips=100",
                "checkpoint.every_steps=1000",
            )  # fmt: skip
            plan = Shards(config).plan(config).plans[0]
            epoch = sum(len(plan.steps(0, w)) for w in range(len(plan.windows(0))))
            config.steps = epoch + 1
            found.append(Case(count, ranks, processes, config, len(plan.index), epoch))
    return found


def main() -> int:
    """Make all runs."""
    o = options(Options, __doc__)
    if min(o.shards, o.ranks, o.workers) < 1:
        raise InputError("shards, ranks and workers must be above 0")
    rows, failed, losses = [], 0, {}  # type: ignore[var-annotated]
    with tempfile.TemporaryDirectory() as temporary:
        bed = Bed(Path(o.folder or temporary))
        shards, number = [], 0
        for shard in range(o.shards):
            entries = [
                (f"{number + n:05d}", {"png": picture(number + n), "txt": b"a block"}) for n in range(1 + shard % 3)
            ]
            shards.append(write(bed.folder / "shards" / f"{shard}.tar", entries))
            number += len(entries)
        index_shards(shards, workers=1)
        for ranks in range(1, o.ranks + 1):
            todo = cases(bed, shards, ranks, o.workers)
            first, *then = todo
            job = Job(first.config, ranks, then=[case.config for case in then])
            job.wait(timeout_s=_CASE_S * len(todo))
            wrong = [(f"{c.shards} shards, {c.ranks} ranks, {c.workers} workers", c.wrong(losses)) for c in todo]
            took = job.seconds / len(todo)
            refusals = [refused(bed, command=ranks == 1 and n == 0) for n in range(o.shards)]
            wrong += [(f"{n + 1} shards, {ranks} ranks, 0 workers", cause) for n, (_, cause) in enumerate(refusals)]
            for name, cause in wrong:
                if cause:
                    failed += 1
                    print(f"FAILED {name}: {cause}", flush=True)
            steps = f"{min(c.epoch for c in todo) + 1} to {max(c.epoch for c in todo) + 1}"
            slowest = f"{max(seconds for seconds, _ in refusals):.1f} s"
            rows.append((f"{ranks}", f"{len(todo)}", steps, f"{took:.1f} s", f"{len(refusals)}", slowest,
                         f"{sum(bool(cause) for _, cause in wrong)}"))  # fmt: skip
            print(" | ".join(rows[-1]), flush=True)
    header = ("ranks", "runs", "steps, the same on all ranks", "seconds a run", "refused (no workers)",
              "slowest refusal (with one rank: as a command)", "hung, unequal or wrong")  # fmt: skip
    if o.write:
        about = f"`{command()}`, ranks on gloo, training and validation."
        write_table("Numbers of shards, ranks and workers", about, header, rows)
    return 1 if failed else 0


if __name__ == "__main__":
    run(main)
