"""A campaign of faults against real runs of one to four ranks, seeded and repeatable.

    python -m benchmarks.faults [kills=200] [terms=200] [damages=600] [nans=20] [spikes=3] [hangs=40] [doubles=20]
                                [skews=6] [disks=20] [elastics=1] [configs=60] [seed=0] [folder=DIR] [write=true]

A number is how many trials of a kind are made; 0 leaves it out. Prints a table of failures and of the rate that they
bound (95%: Clopper-Pearson, 3/n where nothing failed), every failure with its cause, and exits with 1 if there was one.
The ranks are forked from this process, so that a start costs no imports.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from scipy.stats import beta

from benchmarks import fault_trials as trials
from benchmarks.fault_bed import Bed, outcome, run
from benchmarks.report import write as write_table
from sora_train.cli import InputError, options
from sora_train.cli import run as run_command

Trial = Callable[[], str | None]


@dataclass
class Options:
    """Numbers of trials, and where."""

    kills: int = 20
    kills_each: int = 3  # kills of one run
    terms: int = 16
    damages: int = 600
    nans: int = 8
    spikes: int = 1
    hangs: int = 4
    doubles: int = 2
    skews: int = 6
    disks: int = 4
    elastics: int = 1
    configs: int = 60
    seed: int = 0
    folder: str = ""
    write: bool = False  # the table into RESULTS.md


class Campaign:
    """The trials of every kind; what several of them compare with is made once."""

    def __init__(self, folder: Path, o: Options) -> None:
        self.bed, self.o = Bed(folder), o
        self._references: dict[int, dict[str, object]] = {}

    def reference(self, ranks: int) -> dict[str, object]:
        """What an undisturbed run leaves."""
        if ranks not in self._references:
            config = self.bed.config(f"undisturbed-{ranks}", *trials.stage_for(ranks))
            if code := run(config, ranks):
                raise RuntimeError(f"the undisturbed run ended with {code}; see {config.run_dir}")
            self._references[ranks] = outcome(Path(config.run_dir))
        return self._references[ranks]

    def kinds(self) -> Iterator[tuple[str, list[Trial]]]:
        """Name and trials of each kind of fault."""
        bed, o = self.bed, self.o

        def rng(kind: str, n: int) -> random.Random:
            return random.Random(f"{o.seed}/{kind}/{n}")

        def ranks_of(n: int) -> int:
            return 2 + n // 3 % 3

        yield f"kill -9, {o.kills_each} each, two thirds in a save: bitwise the undisturbed run", [
            lambda n=n: trials.kill(
                bed, f"kill-{n}", rng("kill", n), self.reference(ranks_of(n)), ranks_of(n),
                [n % 3 < 2] * o.kills_each,
            )
            for n in range(o.kills)
        ]  # fmt: skip
        yield "stop signal in each of 8 phases: saved at the current step, code 75", [
            lambda n=n: trials.term(bed, f"term-{n}", rng("term", n), trials.PHASES[n % len(trials.PHASES)])
            for n in range(o.terms)
        ]  # fmt: skip
        yield "damaged checkpoint, 12 kinds: the older one chosen, nothing executed", [
            lambda n=n: trials.damage(
                self.source(), bed.run_dir("damaged"), rng("damage", n), trials.DAMAGES[n % len(trials.DAMAGES)]
            )
            for n in range(o.damages)
        ]  # fmt: skip
        yield "loss not finite on one rank: nothing changes on any", [
            lambda n=n: trials.nan(bed, f"nan-{n}", rng("nan", n), n % 4, ("fp32", "bf16")[n // 4 % 2])
            for n in range(o.nans)
        ]  # fmt: skip
        yield "loss spike: rolled back, guilty steps left out, killed after that", [
            lambda n=n: trials.spike(bed, f"spike-{n}", rng("spike", n)) for n in range(o.spikes)
        ]
        yield "a rank stopped: found within time-out + 2 s, stacks written, nothing left", [
            lambda n=n: trials.hang(bed, f"hang-{n}", rng("hang", n), n % 2) for n in range(o.hangs)
        ]
        yield "two runs in a folder: the second refused; kill -9 of the first frees it", [
            lambda n=n: trials.two_jobs(bed, f"double-{n}", rng("double", n)) for n in range(o.doubles)
        ]
        yield "a rank with another version, code, config, index: refused by name", [
            lambda n=n: trials.skew(bed, f"skew-{n}", rng("skew", n), trials.SKEWS[n % len(trials.SKEWS)])
            for n in range(o.skews)
        ]  # fmt: skip
        yield "disk full while saving: older checkpoints intact, then bitwise the undisturbed run", [
            lambda n=n: trials.disk(bed, f"disk-{n}", rng("disk", n), self.reference(2), n % 16)
            for n in range(o.disks)
        ]  # fmt: skip
        yield "2 -> 4 -> 3 -> 1 ranks, stages 1 -> 2 -> 3 -> 0: same samples, losses to 1e-5", [
            lambda n=n: trials.elastic(bed, f"elastic-{n}", trials.LEGS, self.steady(n), f"seed={n}")
            for n in range(o.elastics)
        ]
        yield "wrong configurations: refused with the nearest key, before any process group", [
            lambda n=n: trials.wrong_config(rng("config", n)) for n in range(o.configs)
        ]

    def steady(self, seed: int) -> Path:
        """The folder of a run of one rank, never stopped, with this seed."""
        config = self.bed.config(f"steady-{seed}", "deepspeed=zero0", f"seed={seed}")
        if code := run(config, 1):
            raise RuntimeError(f"the undisturbed run ended with {code}; see {config.run_dir}")
        return Path(config.run_dir)

    def source(self) -> Path:
        """Checkpoints of an undisturbed run of two ranks."""
        self.reference(2)
        return self.bed.run_dir("undisturbed-2") / "checkpoints"


def bound(failures: int, count: int) -> float:
    """The failure rate that is exceeded with 5% probability at most (Clopper and Pearson 1934, one-sided)."""
    return 1.0 if failures == count else float(beta.ppf(0.95, failures + 1, count - failures))


def main() -> int:
    """Run the campaign."""
    o = options(Options, __doc__)
    if any(isinstance(value, int) and value < 0 for name, value in vars(o).items() if name != "seed"):
        raise InputError("numbers of trials must not be below 0")
    rows, failed = [], 0
    with tempfile.TemporaryDirectory() as temporary:
        for kind, todo in Campaign(Path(o.folder or temporary), o).kinds():
            if not todo:
                continue
            began, causes = time.monotonic(), []
            for number, trial in enumerate(todo):
                if cause := trial():
                    causes.append(cause)
                    print(f"FAILED {kind}, trial {number}: {cause}", flush=True)
            failed += len(causes)
            seconds = (time.monotonic() - began) / len(todo)
            rate = f"{bound(len(causes), len(todo)):.2%}"
            rows.append((kind, f"{len(todo)}", f"{len(causes)}", rate, f"{seconds:.1f} s"))
            print(" | ".join(rows[-1]), flush=True)
    header = ("fault", "trials", "failures", "failure rate below (95%)", "seconds each")
    if o.write:
        write_table("Faults", f"`python -m benchmarks.faults {' '.join(sys.argv[1:])}`, ranks on gloo.", header, rows)
    return 1 if failed else 0


if __name__ == "__main__":
    run_command(main)
