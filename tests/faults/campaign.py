"""A campaign of faults against real runs of one to four ranks, seeded and repeatable.

    python -m tests.faults.campaign [kills=200] [terms=200] [damages=600] [starts=60] [nans=20] [spikes=3] [hangs=40]
                                [doubles=20] [skews=6] [disks=20] [elastics=1] [configs=60] [torchrun=10]
                                [seed=0] [folder=DIR] [seconds=280] [write=true]

A number is how many trials of a kind are made; 0 leaves it out. With a `folder` the campaign can be made in slices of
`seconds`: what is in its results.jsonl isn't made again. Prints every failure with its cause and a table of failures
and of the rate that they bound (95%: Clopper-Pearson, 3/n where nothing failed), and exits with 1 if there was one. The
ranks are forked from this process, so that a start costs no imports; every `torchrun`-th kill and stop goes through
torchrun.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.report import write as write_table
from sora_train.core.cli import InputError
from sora_train.core.cli import run as run_command
from sora_train.core.options import options
from sora_train.operations.preflight import code_hash
from tests.faults import configs as fault_configs
from tests.faults import damage as fault_damage
from tests.faults import trials as trials
from tests.faults.bed import PYTHON, Bed, outcome, run
from tests.faults.decode_server import serve
from tests.faults.results import Made, Results, row
from tests.faults.sabotage import HANGS, SKEWS
from tests.load import cpu_s

# Ranks and ZeRO stages that kills are tried with.
_KILLED = ((2, 1), (2, 2), (3, 1), (2, 0), (2, 3), (2, 1), (4, 2), (2, 2))


@dataclass
class Options:
    """Numbers of trials, and where."""

    kills: int = 20
    terms: int = 16
    damages: int = 600
    starts: int = 12
    nans: int = 8
    spikes: int = 1
    hangs: int = 4
    doubles: int = 2
    skews: int = 6
    disks: int = 4
    elastics: int = 1
    configs: int = 60
    torchrun: int = 10  # one of so many kills and stops; 0: none
    seed: int = 0
    folder: str = ""
    seconds: float = 1e9
    write: bool = False  # the table into docs/results.md


@dataclass(frozen=True)
class Kind:
    """A kind of fault: its name, its line in the table, how many trials, and how one is made."""

    name: str
    title: str
    wanted: int
    trial: Callable[[str, random.Random, int], str | None]  # folder's name, generator, number


class Campaign:
    """The trials of every kind; what several of them compare with is made once."""

    def __init__(self, folder: Path, o: Options) -> None:
        self.bed, self.o = Bed(folder), o
        if sys.executable == PYTHON:  # the fork server has imported what a run imports
            self.bed.warm()
        self._references: dict[str, dict[str, Any]] = {}

    def reference(self, name: str, ranks: int, *overrides: str) -> dict[str, Any]:
        """Outcome of an undisturbed run; one that an earlier slice made is taken again."""
        if name not in self._references:
            config = self.bed.config(name, *overrides)
            done = self.bed.run_dir(name) / "exit.json"
            if not (done.exists() and json.loads(done.read_text())["code"] == 0) and (code := run(config, ranks)):
                raise RuntimeError(f"the undisturbed run ended with {code}; see {config.run_dir}")
            self._references[name] = outcome(Path(config.run_dir))
        return self._references[name]

    def plain(self) -> dict[str, Any]:
        """Outcome of an undisturbed run of two ranks, without further averages."""
        return self.reference("plain", 2, *trials.stage_for(2))

    def kinds(self) -> list[Kind]:
        """All of them, most telling first."""
        o = self.o
        return [
            Kind("kill", "kill -9 of one rank or all: bitwise the undisturbed run", o.kills, self.kill),
            Kind("damage", "damaged checkpoint, 12 kinds, loader: the older one chosen, nothing executed", o.damages,
                 self.damage),
            Kind("start", "the same, whole starts: the older one loaded, the end to the bit", o.starts, self.start),
            Kind("term", "stop signal in 8 phases: saved at the step taken last, code 75", o.terms, self.term),
            Kind("hang", "a rank hangs: found within time-out + 2 s, stacks written, nothing left", o.hangs, self.hang),
            Kind("nan", "loss or gradient not finite on one of 4 ranks: nothing changes on any", o.nans, self.nan),
            Kind("disk", "disk full while saving: older checkpoints intact, then bitwise the undisturbed run", o.disks,
                 self.disk),
            Kind("config", "wrong configurations: refused in 3 s of CPU with the nearest key, without torch", o.configs,
                 self.config),
            Kind("double", "two runs in a folder: the second refused; kill -9 of the first frees it", o.doubles,
                 lambda name, rng, n: trials.two_jobs(self.bed, name, rng)),
            Kind("skew", "a rank with other torch, package, key, index, code, variable: refused by name", o.skews,
                 lambda name, rng, n: trials.skew(self.bed, name, rng, SKEWS[n % len(SKEWS)])),
            Kind("elastic", "2 -> 4 -> 3 -> 1 ranks, stages 1 -> 2 -> 3 -> 0: same samples, losses to 1e-5",
                 o.elastics, self.elastic),
            Kind("spike", "loss spike: rolled back, guilty steps left out, killed after that", o.spikes,
                 lambda name, rng, n: trials.spike(self.bed, name, rng)),
        ]  # fmt: skip

    def kill(self, name: str, rng: random.Random, n: int) -> str | None:
        """Mostly one kill; each fifth run has three in one epoch."""
        launched = self._through_torchrun(n)
        if n % 5 == 4:
            wanted = self.reference("epoch", 2, "deepspeed=zero3", *trials.EPOCH)
            inside = [rng.random() < 0.6 for _ in range(3)]
            return trials.kill(self.bed, name, rng, wanted, 2, inside, "deepspeed=zero3", *trials.EPOCH)
        ranks, stage = _KILLED[n % len(_KILLED)] if not launched else (2, 1 + n // 10 % 3)
        settings = (f"deepspeed=zero{stage}", *trials.AVERAGES)
        wanted = self.reference(f"averages-{ranks}-{stage}", ranks, *settings)
        inside = [rng.random() < 0.6]
        return trials.kill(self.bed, name, rng, wanted, ranks, inside, *settings, through_torchrun=launched)

    def term(self, name: str, rng: random.Random, n: int) -> str | None:
        """The phases in turn; a quarter goes on to the end."""
        wanted = self.plain() if n // 8 % 4 == 0 else None
        launched = self._through_torchrun(n)
        return trials.term(self.bed, name, rng, trials.PHASES[n % len(trials.PHASES)], wanted, launched)

    def damage(self, name: str, rng: random.Random, n: int) -> str | None:
        """On copies of one run's checkpoints."""
        self.plain()
        source, target = self.bed.run_dir("plain") / "checkpoints", self.bed.run_dir(name)
        return fault_damage.loader(source, target, rng, fault_damage.DAMAGES[n % len(fault_damage.DAMAGES)])

    def start(self, name: str, rng: random.Random, n: int) -> str | None:
        """On copies of that run."""
        wanted, kind = self.plain(), fault_damage.DAMAGES[n % len(fault_damage.DAMAGES)]
        return fault_damage.start(self.bed, name, "plain", rng, kind, wanted)

    def nan(self, name: str, rng: random.Random, n: int) -> str | None:
        """Every stage, both precisions, loss and gradient in turn."""
        of, precision = ("loss", "gradient")[n // 4 % 2], ("fp32", "bf16")[n // 8 % 2]
        return trials.nan(self.bed, name, rng, n % 4, precision, of)

    def hang(self, name: str, rng: random.Random, n: int) -> str | None:
        """Either rank, every way of hanging in turn."""
        return trials.hang(self.bed, name, rng, n % 2, HANGS[n // 2 % len(HANGS)])

    def disk(self, name: str, rng: random.Random, n: int) -> str | None:
        """Twenty points."""
        return trials.disk(self.bed, name, rng, self.plain(), n % 20)

    def config(self, name: str, rng: random.Random, n: int) -> str | None:
        """In processes of their own."""
        cause, self.bed.facts["took_s"] = fault_configs.refused(rng, n, self.bed.run_dir(name))
        return cause

    def elastic(self, name: str, rng: random.Random, n: int) -> str | None:
        """Beside a run of one rank that is never stopped, with the same seed."""
        config = self.bed.config(f"steady-{n}", "deepspeed=zero0", f"seed={n}")
        if code := run(config, 1):
            raise RuntimeError(f"the undisturbed run ended with {code}; see {config.run_dir}")
        return trials.elastic(self.bed, name, trials.LEGS, Path(config.run_dir), f"seed={n}")

    def _through_torchrun(self, n: int) -> bool:
        launched = self.o.torchrun > 0 and n % self.o.torchrun == self.o.torchrun // 2 and n % 5 != 4
        self.bed.facts["torchrun"] = launched
        return launched


def conduct(campaign: Campaign, results: Results, until: float) -> None:
    """Make what isn't made yet, the kinds side by side, until the time is over."""
    seed, code = campaign.o.seed, code_hash()
    kinds = [kind for kind in campaign.kinds() if kind.wanted]
    todo = {kind.name: [n for n in range(kind.wanted) if (kind.name, n) not in results.made] for kind in kinds}
    while time.monotonic() < until and any(todo.values()):
        kind = max(kinds, key=lambda kind: len(todo[kind.name]) / kind.wanted)
        n = todo[kind.name].pop(0)
        name, campaign.bed.facts = f"{kind.name}-{n}", {}
        _clear(campaign.bed.folder, name)  # what a slice left that was broken off
        began, spent = time.monotonic(), cpu_s()
        cause = kind.trial(name, random.Random(f"{seed}/{kind.name}/{n}"), n)
        seconds, cpu = time.monotonic() - began, cpu_s() - spent
        results.add(Made(kind.name, n, seed, cause, campaign.bed.facts, round(seconds, 2), round(cpu, 2), code))
        if cause:
            print(f"FAILED {kind.name} {n}: {cause}", flush=True)
        else:
            _clear(campaign.bed.folder, name)


def _clear(folder: Path, name: str) -> None:
    """Remove what a trial wrote."""
    for pattern in (name, f"{name}.*", f"{name}-*"):
        for path in folder.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def main() -> int:
    """Run the campaign, or a slice of it."""
    o, until = options(Options, __doc__), time.monotonic()
    if any(value < 0 for name, value in vars(o).items() if isinstance(value, int | float) and name != "seed"):
        raise InputError("numbers of trials and seconds must not be below 0")
    until += o.seconds
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(o.folder or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        results = Results(folder / "results.jsonl", o.seed)
        server = serve()
        try:
            campaign = Campaign(folder, o)
            conduct(campaign, results, until)
        finally:
            server.kill()
            server.wait()
        kinds = [(kind, results.of(kind.name, kind.wanted)) for kind in campaign.kinds()]
    rows = [row(kind.title, made) for kind, made in kinds if made]
    print("\n".join(" | ".join(each) for each in rows), flush=True)
    header = ("fault", "trials", "failures", "failure rate below (95%)", "time, CPU each", "found")
    if o.write:
        arguments = " ".join(a for a in sys.argv[1:] if not a.startswith(("folder=", "write=")))
        about = f"`python -m tests.faults.campaign {arguments}`; ranks on gloo."
        write_table("Faults", about, header, rows)
    return 1 if any(trial.cause for _, made in kinds for trial in made) else 0


if __name__ == "__main__":
    run_command(main)
