"""The faults of the campaign that happen to a run: each function does one trial and returns what was wrong, or None.

A trial gets the bed, a name for its folder and a seeded generator. Longer than other files, because the trials are a
list to read from top to bottom.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import psutil

from sora_train.config.schema import Config
from sora_train.core.cli import BAD_INPUT, STOPPED, InputError
from sora_train.data.order.plan import Position
from sora_train.data.shards import Shards
from sora_train.training.state.checkpoint_format import latest_intact, read_state, verify
from tests.faults.bed import Bed, Job, Launch, differences, lines_of, losses, outcome, run, samples_by_step
from tests.faults.sabotage import (
    HELD_S,
    differ,
    fill_disk,
    hang_in,
    limit_files,
    multiply_gradient,
    multiply_loss,
    note_changes,
    signal_in,
    slow_saves,
)
from tests.load import slack_s

PHASES = (
    "start", "data", "agreement", "forward and backward", "optimizer step", "validation", "samples", "save",
)  # fmt: skip
# Steps between the last one that was done when a signal came and the one that is saved. The ranks agree on a stop at
# the start of a step, and in a validation after it; one that comes later in the step is served by the next.
_SERVED = {"forward and backward": (1, 2), "optimizer step": (1, 2), "validation": (0,), "samples": (0,)}
LEGS = ((2, 1), (4, 2), (3, 3), (1, 0))  # ranks and ZeRO stage, one after the other
AVERAGES = ("optim.ema_lengths=[0.05,0.1]", "checkpoint.snapshot_every=4")  # what kills are tried with
EPOCH = (*AVERAGES, "data.slots=2", "steps=12")  # an epoch of eleven steps, for three resumes in one
_STAGES = (0, 3, 1, 2)  # the ZeRO stage that one, two, three and four ranks are tried with


def stage_for(ranks: int) -> tuple[str, ...]:
    """Overrides that choose the stage of a number of ranks."""
    return (f"deepspeed=zero{_STAGES[ranks - 1]}",)


def kill(
    bed: Bed, name: str, rng: random.Random, reference: dict[str, Any], ranks: int, in_save: Sequence[bool],
    *overrides: str, through_torchrun: bool = False,
) -> str | None:  # fmt: skip
    """Kill one rank or all at a random step, once for each of `in_save` (whether inside a save), each in its own part
    of the run; the end must be the undisturbed run's, to the bit."""
    config, run_dir = bed.config(name, *overrides), bed.run_dir(name)
    torn = 0
    for number, inside in enumerate(in_save):
        first, last = (config.steps * n // len(in_save) for n in (number, number + 1))
        wanted = rng.randint(first + 1, max(first + 1, last - 1))  # a save follows, every second step
        if through_torchrun:
            job: Job | Launch = Launch(config, [*bed.overrides(name), *overrides], ranks)
        else:
            job = Job(config, ranks, lambda mine, rank: slow_saves())
        while not job.poll() and max(samples_by_step(run_dir), default=0) < wanted:
            time.sleep(0.01)
        while inside and not job.poll() and not _saving(run_dir):
            time.sleep(0.001)
        time.sleep(0.0 if through_torchrun else rng.uniform(0, HELD_S if inside else 0.02))
        if job.poll():
            return f"ended with {job.wait()} before kill {number} at step {wanted}: {tail(config)}"
        job.send(signal.SIGKILL, None if rng.random() < 0.5 else rng.randrange(ranks))
        killed, reached = time.monotonic(), max(samples_by_step(run_dir))
        job.wait()
        torn += _saving(run_dir)
        if wrong := _false_success(config):
            return f"kill {number} at step {wanted}: {wrong}"
        if isinstance(job, Job) and job.stuck:
            shutil.copy(job.log, bed.folder / f"stuck {name}.txt")
            return f"kill {number} at step {wanted}: {job.stuck} rank(s) didn't end by themselves"
    job = Job(config, ranks)
    resumed = _first_step_after(job, run_dir)
    recovery_s = time.monotonic() - killed
    if code := job.wait():
        return f"ended with {code}: {tail(config)}"
    bed.facts |= {"torn": torn, "kills": len(in_save), "lost_steps": reached - resumed}
    bed.facts["recovery_s"] = recovery_s
    differing = differences(reference, outcome(run_dir))
    return f"differs in {', '.join(differing)}" if differing else None


def _false_success(config: Config) -> str | None:
    """Check an exit.json that says a killed run is done: it may be, but then its last step is saved."""
    note, run_dir = Path(config.run_dir) / "exit.json", Path(config.run_dir)
    if not note.exists() or json.loads(note.read_text())["code"] != 0:
        return None
    last = run_dir / "checkpoints" / f"step-{config.steps:08d}"
    damage = verify(last)
    return f"exit.json says done, and {last.name} is not: {damage}" if damage else None


def _first_step_after(job: Job, run_dir: Path) -> int:
    """Wait until a run that goes on has taken a step; the step that it went on from."""
    metrics = run_dir / "metrics.jsonl"
    before = metrics.stat().st_ino if metrics.exists() else 0
    resumed = 0
    with suppress(InputError):  # killed before its first checkpoint
        resumed = read_state(latest_intact(run_dir / "checkpoints"))["step"]
    while not job.poll():
        cut = metrics.exists() and metrics.stat().st_ino != before  # of what the killed run had logged after that
        if cut and max((line["step"] for line in lines_of(metrics)), default=0) > resumed:
            break
        time.sleep(0.01)
    return int(resumed)


def elastic(
    bed: Bed, name: str, legs: Sequence[tuple[int, int]], reference: Path, *overrides: str, tolerance: float = 1e-5
) -> str | None:
    """Stop and go on with other ranks and ZeRO stages; samples of each step and losses are those of `reference`."""
    for number, (ranks, stage) in enumerate(legs):
        config = bed.config(name, f"deepspeed=zero{stage}", *overrides)
        last = number == len(legs) - 1
        steps = bed.steps * (number + 1) // len(legs) - bed.steps * number // len(legs)

        def stop(mine: Config, rank: int, last: bool = last, steps: int = steps) -> None:
            if not last:
                signal_in("agreement", steps, signal.SIGTERM)

        if (code := run(config, ranks, stop)) != (0 if last else STOPPED):
            return f"{ranks} ranks at stage {stage}: ended with {code}: {tail(config)}"
    return unlike(reference, bed.run_dir(name), tolerance, bed.facts)


def unlike(reference: Path, other: Path, tolerance: float = 1e-5, facts: dict[str, Any] | None = None) -> str | None:
    """First difference between two runs in the samples of a step, or in its loss beyond a relative tolerance."""
    if samples_by_step(reference) != samples_by_step(other):
        return f"{other.name} took other samples than {reference.name}"
    ours, theirs = losses(reference), losses(other)
    if ours.keys() != theirs.keys():
        return f"{other.name} logged steps {sorted(theirs)}, {reference.name} {sorted(ours)}"
    far = {step: abs(theirs[step] / ours[step] - 1) for step in ours}
    worst = max(far, key=lambda step: far[step])
    if facts is not None:
        facts["loss_off"] = far[worst]
    return None if far[worst] <= tolerance else f"{other.name} step {worst}: loss is {far[worst]:.1e} off"


def disk(bed: Bed, name: str, rng: random.Random, reference: dict[str, Any], point: int) -> str | None:
    """A disk that is full at one of the 16 writes of four saves (12 of rank 0, 4 of rank 1), for a few writes or for
    good, or (points 16 to 19) one whose kernel cuts files off: what is on it stays intact, the run goes on or ends
    cleanly, and with room again ends as the undisturbed one.
    """
    victim, at = (0, 1 + point) if point < 12 else (1, point - 11) if point < 16 else (point % 2, 0)
    lasts = rng.choice((1, 2, 1 << 30))
    config = bed.config(name, *stage_for(2))

    def sabotage(mine: Config, rank: int) -> None:
        if rank == victim and point < 16:
            fill_disk(at, lasts)
        elif rank == victim:  # a rank's tensors are 60 KB; its logs and the JSON are smaller than that
            limit_files(rng.randrange(12_000, 50_000))

    code = run(config, 2, sabotage)
    if code not in (0, 1) or "Traceback" in tail(config):
        return f"point {point}: ended with {code}: {tail(config)}"
    text = config_log(config)
    if "not written: rank" not in text:
        return f"point {point}: the failed save was not told: {tail(config)}"
    if code == 1 and "could not be written" not in tail(config):
        return f"point {point}: ended without saying why: {tail(config)}"
    for path in (bed.run_dir(name) / "checkpoints").glob("step-*"):
        if damage := verify(path):
            return f"point {point}: {path.name} is not intact: {damage}"
    if code := run(config, 2):
        return f"point {point}: with room again ended with {code}: {tail(config)}"
    differing = differences(reference, outcome(bed.run_dir(name)))
    return f"point {point}: differs in {', '.join(differing)}" if differing else None


def term(
    bed: Bed, name: str, rng: random.Random, phase: str, reference: dict[str, Any] | None,
    through_torchrun: bool = False,
) -> str | None:  # fmt: skip
    """Signal one rank or all in a phase, sometimes twice: a checkpoint of the step under way or of the next, code 75,
    no decode child lost. With a reference, the run then goes on and must end as that one, which was never stopped, nor
    validated, sampled from or evaluated."""
    number = rng.choice((signal.SIGTERM, signal.SIGUSR1, signal.SIGINT))
    count, victim = rng.randint(1, 2), rng.choice((None, 0, 1))
    count = 1 if phase in ("start", "validation", "samples") else count
    again_s = 0.0 if number == signal.SIGINT or rng.random() < 0.5 else 0.1  # a second Ctrl-C means something else
    looks = (
        "logging.validate_every=4",
        "logging.sample_every=4",
        "logging.evaluate_every=4",
        "logging.evaluate_clips=2",
    )
    settings = (*stage_for(2), *looks)
    config, run_dir = bed.config(name, *settings), bed.run_dir(name)
    note = bed.folder / f"{name}.signalled"
    note.unlink(missing_ok=True)
    if through_torchrun:
        about = json.dumps({"phase": phase, "count": count, "number": int(number), "note": str(note)})
        own = [*bed.overrides(name), *settings]
        code = Launch(config, own, 2, "tests.faults.start", about).wait()
    else:
        code = Job(
            config, 2,
            lambda mine, rank: signal_in(phase, count, number, again_s, note=note if rank == (victim or 0) else None)
            if victim in (None, rank) else None,
        ).wait()  # fmt: skip
    sent = signal.Signals(number).name
    if code != STOPPED:
        return f"{phase}: ended with {code} after {sent}: {tail(config)}"
    ended, signalled = time.time(), json.loads(note.read_text())
    newest = latest_intact(run_dir / "checkpoints")
    saved = read_state(newest)["step"]
    if saved != max(samples_by_step(run_dir)):
        return f"{phase}: {newest.name} is not of the last step taken"
    after = saved - signalled["done"]
    if after not in _SERVED.get(phase, (1,)) and not through_torchrun:  # whose launcher takes its time
        return f"{phase}: {sent} came after step {signalled['done']}, saved was {saved}"
    if lines_of(run_dir / "quarantine.jsonl"):
        return f"{phase}: samples were refused: {lines_of(run_dir / 'quarantine.jsonl')}"
    bed.facts |= {"steps_after": after, "served_s": ended - signalled["time"]}
    if reference is None:
        return None
    if code := run(config, 2):
        return f"{phase}: went on and ended with {code}: {tail(config)}"
    differing = differences(reference, outcome(run_dir))
    return f"{phase}: differs in {', '.join(differing)}" if differing else None


def nan(bed: Bed, name: str, rng: random.Random, stage: int, precision: str, of: str, ranks: int = 4) -> str | None:
    """A loss or gradient that isn't finite on one rank in one step: nothing changes on any rank, and the samples are
    named."""
    victim, bad_step = rng.randrange(ranks), rng.randint(2, 5)
    value = rng.choice((float("nan"), float("inf"), float("-inf")))
    config = bed.config(name, *AVERAGES, "steps=6", f"deepspeed=zero{stage}", f"precision={precision}")
    breaking = {"loss": multiply_loss, "gradient": multiply_gradient}[of]

    def sabotage(mine: Config, rank: int) -> None:
        breaking(lambda step: value if rank == victim and step == bad_step else 1.0)
        note_changes(Path(mine.run_dir) / f"changes-{rank}.jsonl")

    where = f"{of} {value} on rank {victim} in step {bad_step}, stage {stage} {precision}"
    if code := run(config, ranks, sabotage):
        return f"{where}: ended with {code}: {tail(config)}"
    counters = []
    for rank in range(ranks):
        lines = lines_of(bed.run_dir(name) / f"changes-{rank}.jsonl")
        kept = [line["step"] for line in lines if not line["changed"]]
        if kept != [bad_step] or [line["step"] for line in lines if not line["applied"]] != [bad_step]:
            changed = [line["changed"][:3] for line in lines if line["step"] == bad_step]
            return f"{where}: rank {rank} kept its state at steps {kept}, not {changed}"
        counters.append([line["counters"] for line in lines])
    if any(mine != counters[0] for mine in counters) or counters[0][-1] != [5, 5, 5]:
        return f"{where}: the ranks count their steps and averages as {counters}"
    skipped = lines_of(bed.run_dir(name) / "skipped.jsonl")
    guilty = [e["rank"] for e in skipped if e["loss"] in ("nan", "inf", "-inf")]
    if guilty != [victim] * (of == "loss") or {e["step"] for e in skipped} != {bad_step} or len(skipped) != ranks:
        return f"{where}: skipped.jsonl names {skipped}"
    return None


def spike(bed: Bed, name: str, rng: random.Random) -> str | None:
    """Three steps of the plan with a huge loss: back to the checkpoint before, those left out; also if killed then."""
    settings = ("steps=34", "checkpoint.every_steps=8", "checkpoint.keep=4")
    first = rng.randint(25, 27)
    plan = Shards(bed.config(name)).plan(bed.config(name)).from_position(Position())
    guilty = [position for position, _ in islice(plan, first + 2)][-3:]

    def sabotage(mine: Config, rank: int) -> None:
        multiply_loss(lambda step: 1e3, lambda position: position in guilty)

    code = run(bed.config(name, *settings), 2, sabotage)
    record = bed.run_dir(name) / "left_out.jsonl"
    if code or not record.exists():
        return f"ended with {code}, left out {record.exists()}: {tail(bed.config(name))}"
    (entry,) = lines_of(record)
    if entry["back_to"] != 24 or not {tuple(p) for p in entry["positions"]} >= set(guilty):
        return f"left out {entry}, the guilty ones were {guilty}"
    taken = [tuple(e["position"]) for e in lines_of(bed.run_dir(name) / "ledger" / "rank-0.jsonl")]
    if len(taken) != 34 or set(taken) & set(guilty):
        return f"took {len(taken)} steps, of the guilty ones {set(taken) & set(guilty)}"
    job = Job(bed.config(f"{name}-killed", *settings), 2, sabotage)
    while not job.poll() and not (bed.run_dir(f"{name}-killed") / "left_out.jsonl").exists():
        time.sleep(0.005)
    job.send(signal.SIGKILL)
    job.wait()
    if code := run(bed.config(f"{name}-killed", *settings), 2, sabotage):
        return f"ended with {code} after a kill: {tail(bed.config(f'{name}-killed'))}"
    differing = differences(outcome(bed.run_dir(name)), outcome(bed.run_dir(f"{name}-killed")))
    return f"a kill after the rollback changes {', '.join(differing)}" if differing else None


def hang(bed: Bed, name: str, rng: random.Random, rank: int, kind: str) -> str | None:
    """One rank stands still: found within the time-out and two seconds (more on a busy machine), stacks of the live one
    on disk, and within ten more seconds no process is left, decode children included."""
    limit, note = 4.0, bed.folder / f"{name}.hung"
    config = bed.config(name, "steps=1000", f"guard.timeout_s={limit}")
    phase, count = rng.choice(("data", "forward and backward", "optimizer step")), rng.randint(2, 6)
    note.unlink(missing_ok=True)
    job = Job(config, 2, lambda mine, r: hang_in(phase, count, kind, note) if r == rank else None)
    code = job.wait(timeout_s=120)
    gone = time.time()
    stopped = float(note.read_text())
    slack = slack_s()
    children = _decode_children(until=stopped + limit + 12.0 + slack)
    stacks = bed.run_dir(name) / "logs" / f"rank-{1 - rank}.stacks.txt"
    text = stacks.read_text() if stacks.exists() else ""
    if "no progress for" not in text or "trainer.py" not in text or "phase" not in text:
        return f"{kind} in {phase}: rank {1 - rank} left no stacks; ended with {code}: {tail(config)}"
    found = stacks.stat().st_mtime - stopped
    bed.facts |= {"found_s": found, "gone_s": gone - stopped}
    if code != 1 or found > limit + 2.0 + slack or gone - stopped > limit + 12.0 + slack or children:
        times = f"found after {found:.1f} s, gone after {gone - stopped:.1f} s"
        return f"{kind}: ended with {code}, {times}, {children} decode children left"
    reason = json.loads((bed.run_dir(name) / "exit.json").read_text())["reason"]
    return None if "made no progress" in reason else f"{kind}: exit.json says {reason!r}"


def _decode_children(until: float) -> int:
    """Decode processes below this one, when none is left or time is up."""
    while True:
        below = _below(psutil.Process())
        alive = {p.pid for p in below if "sora_train.data.read.decode_child" in _command(p)}
        forked = {p.pid for server in below if "tests.faults.decode_server" in _command(server) for p in _below(server)}
        if not (alive | forked) or time.time() > until:
            return len(alive | forked)
        time.sleep(0.1)


def _below(process: psutil.Process) -> list[psutil.Process]:
    while True:
        with suppress(psutil.NoSuchProcess):  # one that ends while the list is made
            return list(process.children(recursive=True))
        if not process.is_running():
            return []


def _command(process: psutil.Process) -> list[str]:
    with suppress(psutil.Error):
        return process.cmdline()
    return []


def two_jobs(bed: Bed, name: str, rng: random.Random) -> str | None:
    """A second run in a folder is refused by name; after kill -9 of the first the next takes the folder over."""
    config = bed.config(name, "steps=1000")
    first, wanted = Job(config, 1), rng.randint(1, 4)
    while not first.poll() and len(samples_by_step(bed.run_dir(name))) < wanted:
        time.sleep(0.02)
    steps = len(samples_by_step(bed.run_dir(name)))
    second = Job(config, 1)
    code = second.wait()
    alive = not first.poll()
    first.send(signal.SIGKILL)
    first.wait()
    if code != BAD_INPUT or not alive or f"process {first.pids[0]}" not in tail(config):
        return f"the second ended with {code}, the first was {'alive' if alive else 'gone'}: {tail(config)}"
    if len(samples_by_step(bed.run_dir(name))) < steps:
        return "the second touched the ledger of the first"
    third = Job(bed.config(name, "steps=8"), 1)
    if code := third.wait():
        return f"not taken over: {code}: {tail(config)}"
    holder = json.loads((bed.run_dir(name) / "lock.json").read_text())
    return None if holder["pid"] == third.pids[0] else f"lock.json names {holder}"


def skew(bed: Bed, name: str, rng: random.Random, kind: str) -> str | None:
    """One rank differs: refused before the first step, the rank and the thing named."""
    odd, told = rng.randrange(3), bed.folder / f"{name}.told"

    def sabotage(mine: Config, rank: int) -> None:
        if rank == odd:
            told.write_text(differ(mine, kind))

    config = bed.config(name)
    code = run(config, 3, sabotage)
    wanted = f"rank {odd} has {told.read_text()} = "
    if code != BAD_INPUT or wanted not in tail(config) or (bed.run_dir(name) / "ledger").exists():
        return f"{kind}: ended with {code}, not {wanted!r}: {tail(config)}"
    return None


def _saving(run_dir: Path) -> bool:
    return any((run_dir / "checkpoints").glob(".tmp-step-*"))


def config_log(config: Config) -> str:
    """All that the ranks printed."""
    path = Path(config.run_dir).with_suffix(".out")
    return path.read_text() if path.exists() else ""


def tail(config: Config) -> str:
    """The end of what the ranks printed."""
    return config_log(config)[-1500:] or "(no output)"
