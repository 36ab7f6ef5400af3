"""A run of two ranks for an hour with a fault about every two minutes: it must end, and nothing may grow.

    python -m tests.faults.soak [minutes=60] [every_s=120] [seed=0] [folder=DIR] [write=true]

In turn: a loss that isn't finite on one rank, a shard damaged on the disk (mended later), kill -9 of one rank or of
all, a NaN, a damaged shard, a stop signal. What ends the ranks is answered by the same start again, as a scheduler
would do; the ranks are forked from this process, the decode children are the product's own. Memory, descriptors and
threads of each rank with its children, and what lies in /dev/shm, are noted every five seconds. At the end the run is
told to finish some steps later; its ledger must then hold every step of the plan once. Exits with 1 if something was
wrong. A little longer than most files, as faults, answers and watch share one state.
"""

from __future__ import annotations

import json
import random
import signal
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import psutil

from benchmarks.report import write as write_table
from sora_train.config.schema import Config
from sora_train.core.cli import STOPPED, InputError
from sora_train.core.cli import run as run_command
from sora_train.core.options import options
from sora_train.data.order.plan import Position
from sora_train.data.shards import Shards
from tests.faults.bed import Bed, Job, samples_by_step
from tests.faults.sabotage import multiply_loss

_TURNS = ("nan", "shard", "kill", "nan", "shard", "stop")
_LOOK_S = 5.0
_YOUNG_S = 40.0  # of a start: imports, first allocations and first packs make a process grow, and are no leak
_OLD_S = 180.0
_SETTINGS = (
    "steps=1000000", "optim.decay_fraction=0", "checkpoint.every_steps=50", "logging.every_steps=10",
    "logging.validate_every=200", "logging.sample_every=1000", "deepspeed=zero2", "vae.cache_mib=0",
    "optim.ema_lengths=[0.05,0.1]", "checkpoint.snapshot_every=200", "checkpoint.snapshots=4",
    "guard.max_futile_restarts=1000",
)  # fmt: skip


@dataclass
class Options:
    """Options: duration and folder."""

    minutes: float = 60.0
    every_s: float = 120.0
    seed: int = 0
    folder: str = ""
    write: bool = False  # the table into docs/results.md


@dataclass
class Look:
    """Measurements of one moment: seconds since the soak began and since the ranks did, and sums over rank 0 and 1."""

    at: float
    age: float
    mib: float
    files: int
    threads: int
    shm_mib: float


@dataclass
class Soak:
    """The run, and what was seen of it."""

    bed: Bed
    o: Options
    looks: list[Look] = field(default_factory=list)
    faults: dict[str, int] = field(default_factory=dict)
    lives: list[tuple[int, int, float]] = field(default_factory=list)  # first and last step, seconds until the first
    wrong: list[str] = field(default_factory=list)

    def run(self) -> None:
        """Until the time is over, then to the end of the run."""
        self.began = self.fell = time.monotonic()
        self.rng = random.Random(self.o.seed)
        self.config = self.bed.config("soak", *_SETTINGS)
        self.run_dir = Path(self.config.run_dir)
        self.pristine = {Path(s): Path(s).read_bytes() for s in Shards(self.config).training}
        turns = self._turns()
        self._start()
        while time.monotonic() - self.began < self.o.minutes * 60:
            self._watch(self.o.every_s)
            kind = next(turns)
            self.faults[kind] = self.faults.get(kind, 0) + 1
            getattr(self, f"_{kind}")()
        self._mend()
        self._end_of_life(signal.SIGTERM, None, STOPPED)
        last = max(samples_by_step(self.run_dir)) + 10
        self.job = Job(self.bed.config("soak", *_SETTINGS, f"steps={last}"), 2)
        if code := self.job.wait():
            self.wrong.append(f"the end: {code}")
        self.minutes = (time.monotonic() - self.began) / 60
        self.wrong += list(self._ledger_mistakes(last))

    def _turns(self) -> Iterator[str]:
        while True:
            yield from _TURNS

    def _start(self) -> None:
        saved = [path.name for path in (self.run_dir / "checkpoints").glob("step-*")]
        self.first = int(max(saved, default="step-0").removeprefix("step-"))  # where it will go on from
        ledger = self.run_dir / "ledger/rank-0.jsonl"
        before = ledger.stat().st_ino if ledger.exists() else 0  # cut by the start, which makes another file of it
        self.started = time.monotonic()
        self.job = Job(self.config, 2, _listen)
        while not self.job.poll():
            if ledger.exists() and ledger.stat().st_ino != before and self._step() > self.first:
                break
            time.sleep(0.1)
        self.idle = time.monotonic() - self.fell

    def _step(self) -> int:
        """The newest step in rank 0's ledger, by its last line."""
        with suppress(OSError, ValueError, IndexError):
            return int(json.loads((self.run_dir / "ledger/rank-0.jsonl").read_bytes().splitlines()[-1])["step"])
        return 0

    def _watch(self, seconds: float) -> None:
        """Let it train, and look now and then; ranks that end by themselves are a failure."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            time.sleep(_LOOK_S)
            if self.job.poll():
                self.wrong.append(f"ended by itself with {self.job.wait()} at step {self._step()}")
                self._end_of_life(signal.SIGTERM, None, None)
                self._start()
                return
            with suppress(psutil.Error, OSError):
                self.looks.append(self._look())

    def _look(self) -> Look:
        now = time.monotonic()
        ranks = [psutil.Process(pid) for pid in self.job.pids]
        everyone = [p for rank in ranks for p in (rank, *rank.children(recursive=True))]
        shm = sum(map(_shared_bytes, everyone)) / 2**20
        return Look(
            now - self.began, now - self.started, sum(p.memory_full_info().uss for p in everyone) / 2**20,
            sum(p.num_fds() for p in everyone), sum(p.num_threads() for p in everyone), shm,
        )  # fmt: skip

    def _nan(self) -> None:
        (self.run_dir / "inject-nan").touch()

    def _shard(self) -> None:
        """Flip a byte of one member; before the next fault it is mended."""
        refused = self._refused()
        path = self.rng.choice(sorted(self.pristine))
        with tarfile.open(path) as tar:
            media = [m for m in tar.getmembers() if m.name.endswith(("mp4", "png"))]
        member = self.rng.choice(media)
        with path.open("r+b") as file:
            file.seek(member.offset_data + member.size // 2)
            byte = file.read(1)
            file.seek(-1, 1)
            file.write(bytes([byte[0] ^ 1]))
        self._watch(self.o.every_s / 2)
        self._mend()
        if self._refused() == refused:
            self.wrong.append(f"the damage to {path.name} was not seen")

    def _refused(self) -> int:
        quarantine = self.run_dir / "quarantine.jsonl"
        return len(quarantine.read_text().splitlines()) if quarantine.exists() else 0

    def _mend(self) -> None:
        for path, data in self.pristine.items():
            if path.read_bytes() != data:
                with path.open("r+b") as file:  # the same inode, as a repair in place would do
                    file.write(data)

    def _kill(self) -> None:
        self._end_of_life(signal.SIGKILL, self.rng.choice((None, 0, 1)), None)
        self._start()

    def _stop(self) -> None:
        self._end_of_life(self.rng.choice((signal.SIGTERM, signal.SIGUSR1)), self.rng.choice((None, 0, 1)), STOPPED)
        self._start()

    def _end_of_life(self, number: int, rank: int | None, wanted: int | None) -> None:
        self.fell = time.monotonic()
        self.job.send(number, rank)
        code = self.job.wait()
        if wanted is not None and code != wanted:
            self.wrong.append(f"{signal.Signals(number).name}: ended with {code}")
        self.lives.append((self.first, self._step(), self.idle))

    def _ledger_mistakes(self, last: int) -> Iterator[str]:
        """Steps that are not the plan's: each must be there once, with the plan's samples, taken or refused."""
        plan = islice(Shards(self.config).plan(self.config).from_position(Position()), last)
        planned = [(tuple(at), sorted(v.sample for slot in slots for v in slot)) for at, slots in plan]
        entries: dict[int, list[dict[str, Any]]] = {}
        for rank in range(2):
            lines = (self.run_dir / f"ledger/rank-{rank}.jsonl").read_text().splitlines()
            steps = [json.loads(line) for line in lines]
            if [entry["step"] for entry in steps] != list(range(1, last + 1)):
                yield f"rank {rank}'s ledger doesn't hold the steps 1 to {last} once each"
            for entry in steps:
                entries.setdefault(entry["step"], []).append(entry)
        for step, (at, samples) in enumerate(planned, 1):
            mine = entries.get(step, [])
            found = sorted(s for e in mine for s in (*e["samples"], *(r["sample"] for r in e["refused"])))
            if found != samples or {tuple(e["position"]) for e in mine} != {at}:
                yield f"step {step} took {found} at {[e['position'] for e in mine]}, planned {samples} at {at}"

    def rows(self) -> list[tuple[str, str]]:
        """The table."""
        grown = [look for look in self.looks if look.age > _YOUNG_S]
        steps = sum(last - first for first, last, _ in self.lives)
        final = max((last for _, last, _ in self.lives), default=0)
        idle = sum(seconds for *_, seconds in self.lives)
        return [
            ("minutes, starts, faults", f"{self.minutes:.0f}, {len(self.lives) + 1}, "
             + ", ".join(f"{count} x {kind}" for kind, count in sorted(self.faults.items()))),
            ("steps that count, of steps taken", f"{final:,} of {steps:,} ({final / max(steps, 1):.1%})"),
            ("goodput: time that isn't between a fault and the next step, times that share",
             f"{(1 - idle / self.minutes / 60) * final / max(steps, 1):.1%}"),
            ("memory of ranks and children (unique set), start and end", _ends(grown, "mib", "MiB")),
            ("slope of the memory", f"{slope([(look.at, look.mib) for look in grown]) * 3600:+.2f} MiB an hour"),
            (f"the same of ranks older than {_OLD_S:.0f} s",
             f"{slope([(look.at, look.mib) for look in grown if look.age > _OLD_S]) * 3600:+.2f} MiB an hour"),
            ("open files", _ends(grown, "files", "")),
            ("threads", _ends(grown, "threads", "")),
            ("shared memory", _ends(grown, "shm_mib", "MiB")),
            ("failures", "; ".join(self.wrong) or "none"),
        ]  # fmt: skip


def _listen(config: Config, rank: int) -> None:
    """Have rank 1 make the loss of one step NaN when it is asked to."""
    asked = Path(config.run_dir) / "inject-nan"

    def factor(step: int) -> float:
        with suppress(FileNotFoundError):
            asked.unlink()
            return float("nan")
        return 1.0

    if rank == 1:
        multiply_loss(factor)


def slope(points: list[tuple[float, float]]) -> float:
    """Rise per unit: the median over pairs of points half of the way apart (Theil and Sen), which a jump can't bend."""
    half = len(points) // 2
    pairs = zip(points[:half], points[len(points) - half :], strict=True)
    rises = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in pairs if b[0] > a[0]]
    return statistics.median(rises) if rises else 0.0


def _shared_bytes(process: psutil.Process) -> int:
    """Sizes of the files in shared memory that a process has open, with names or without."""
    total = 0
    for descriptor in Path(f"/proc/{process.pid}/fd").iterdir():
        with suppress(OSError):
            if str(descriptor.readlink()).startswith("/dev/shm"):
                total += descriptor.stat().st_size
    return total


def _ends(looks: list[Look], name: str, unit: str) -> str:
    """Medians of the first and last tenth, and the range."""
    values = [getattr(look, name) for look in looks]
    tenth = max(1, len(values) // 10)
    first, last = statistics.median(values[:tenth]), statistics.median(values[-tenth:])
    return f"{first:,.1f} and {last:,.1f} {unit} ({min(values):,.1f} to {max(values):,.1f})".replace(".0", "")


def main() -> int:
    """Run it."""
    o = options(Options, __doc__)
    if o.minutes <= 0 or o.every_s <= 0:
        raise InputError("minutes and every_s must be above 0")
    with tempfile.TemporaryDirectory() as temporary:
        soak = Soak(Bed(Path(o.folder or temporary)), o)
        soak.run()
        rows = soak.rows()
        looks = "\n".join(json.dumps(vars(look)) for look in soak.looks)
        (soak.bed.folder / "looks.jsonl").write_text(looks + "\n")
    print("\n".join(f"{name}: {value}" for name, value in rows), flush=True)
    if o.write:
        about = f"`python -m tests.faults.soak {' '.join(sys.argv[1:])}`: two ranks on gloo, forked."
        write_table("Soak", about, ("what", "measured"), rows)
    return 1 if soak.wrong else 0


if __name__ == "__main__":
    run_command(main)
