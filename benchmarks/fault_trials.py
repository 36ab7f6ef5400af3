"""The faults of the campaign: each function does one trial and returns what was wrong, or None.

A trial gets the bed, a name for its folder and a seeded generator. Longer than other files, because the trials share
the sabotages at the end, and are a list to read from top to bottom.
"""

from __future__ import annotations

import errno
import json
import pickle
import random
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException

from benchmarks.fault_bed import Bed, Job, differences, losses, outcome, run, samples_by_step
from sora_train.assemble import Shards
from sora_train.cli import BAD_INPUT, STOPPED, InputError
from sora_train.compose import CONF
from sora_train.config import Config, build, known_keys
from sora_train.data.plan import Position
from sora_train.operations import preflight
from sora_train.training import checkpoint, watch
from sora_train.training.trainer import Trainer
from sora_train.training.zero import Engine

PHASES = (
    "start", "data", "agreement", "forward and backward", "optimizer step", "validation", "samples", "save",
)  # fmt: skip
DAMAGES = (
    "flip", "truncate", "delete", "empty", "swapped", "stale", "manifest flip", "no manifest", "pointer to nothing",
    "half deleted", "pickle", "pickle with manifest",
)  # fmt: skip
SKEWS = ("torch", "package", "config", "data set index", "code", "environment")
LEGS = ((2, 1), (4, 2), (3, 3), (1, 0))  # ranks and ZeRO stage, one after the other
_WAITS = 0.15  # seconds that a save is held open for, so that kills fall into it


def kill(
    bed: Bed, name: str, rng: random.Random, reference: dict[str, Any], ranks: int, in_save: Sequence[bool]
) -> str | None:
    """Kill one rank or all at a random step, once for each of `in_save` (whether inside a save), each in its own part
    of the run; the end must be the undisturbed run's, to the bit."""
    config, run_dir = bed.config(name, *stage_for(ranks)), bed.run_dir(name)
    for number, inside in enumerate(in_save):
        first, last = (bed.steps * n // len(in_save) for n in (number, number + 1))
        wanted = rng.randint(first + 1, max(first + 1, last - 1))  # a save follows, every second step
        job = Job(config, ranks, _slow_saves)
        while not job.poll() and max(samples_by_step(run_dir), default=0) < wanted:
            time.sleep(0.01)
        while inside and not job.poll() and not _saving(run_dir):
            time.sleep(0.005)
        time.sleep(rng.uniform(0, _WAITS if inside else 0.02))
        if job.poll():
            return f"ended with {job.wait()} before kill {number} at step {wanted}: {_tail(config)}"
        job.send(signal.SIGKILL, None if rng.random() < 0.5 else rng.randrange(ranks))
        job.wait()
        bed.torn_saves += _saving(run_dir)
    code = run(config, ranks)
    if code:
        return f"ended with {code}: {_tail(config)}"
    differing = differences(reference, outcome(run_dir))
    return f"differs in {', '.join(differing)}" if differing else None


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
                _signal_in("agreement", steps, signal.SIGTERM)

        if (code := run(config, ranks, stop)) != (0 if last else STOPPED):
            return f"{ranks} ranks at stage {stage}: ended with {code}: {_tail(config)}"
    return unlike(reference, bed.run_dir(name), tolerance)


def unlike(reference: Path, other: Path, tolerance: float = 1e-5) -> str | None:
    """Where the samples of a step, or its loss by more than a relative tolerance, differ between two runs."""
    if samples_by_step(reference) != samples_by_step(other):
        return f"{other.name} took other samples than {reference.name}"
    ours, theirs = losses(reference), losses(other)
    if ours.keys() != theirs.keys():
        return f"{other.name} logged steps {sorted(theirs)}, {reference.name} {sorted(ours)}"
    far = {step: abs(theirs[step] / ours[step] - 1) for step in ours}
    worst = max(far, key=lambda step: far[step])
    return None if far[worst] <= tolerance else f"{other.name} step {worst}: loss is {far[worst]:.1e} off"


def disk(bed: Bed, name: str, rng: random.Random, reference: dict[str, Any], point: int) -> str | None:
    """A disk that is full at one of the 16 writes of four saves (12 of rank 0, 4 of rank 1), for a few writes or for
    good: what is on it stays intact, the run goes on or ends cleanly, and with room again ends as the undisturbed one.
    """
    victim, at = (0, 1 + point) if point < 12 else (1, point - 11)
    lasts = rng.choice((1, 2, 1 << 30))
    config = bed.config(name, *stage_for(2))

    def sabotage(mine: Config, rank: int) -> None:
        if rank == victim:
            _fill_disk(at, lasts)

    code = run(config, 2, sabotage)
    if code not in (0, 1) or "Traceback" in _tail(config):
        return f"point {point}: ended with {code}: {_tail(config)}"
    if code == 1 and "could not be written" not in _tail(config):
        return f"point {point}: ended without saying why: {_tail(config)}"
    for path in (bed.run_dir(name) / "checkpoints").glob("step-*"):
        if damage := checkpoint.verify(path):
            return f"point {point}: {path.name} is not intact: {damage}"
    if code := run(config, 2):
        return f"point {point}: with room again it ended with {code}: {_tail(config)}"
    differing = differences(reference, outcome(bed.run_dir(name)))
    return f"point {point}: differs in {', '.join(differing)}" if differing else None


def term(bed: Bed, name: str, rng: random.Random, phase: str) -> str | None:
    """Signal one rank or all in a phase; a checkpoint of the current step, code 75, and the run goes on to its end."""
    number = rng.choice((signal.SIGTERM, signal.SIGUSR1, signal.SIGINT))
    count, victim = rng.randint(1, 2), rng.choice((None, 0, 1))
    config = bed.config(name, "steps=8", "logging.validate_every=2", "logging.sample_every=2")

    def sabotage(mine: Config, rank: int) -> None:
        if victim in (None, rank):
            _signal_in(phase, count if phase != "start" else 1, number)

    job = Job(config, 2, sabotage)
    code = job.wait()
    if code != STOPPED:
        return f"{phase}: ended with {code} after {signal.Signals(number).name}: {_tail(config)}"
    newest = checkpoint.latest_intact(bed.run_dir(name) / "checkpoints")
    if checkpoint.read_state(newest)["step"] != max(samples_by_step(bed.run_dir(name))):
        return f"{phase}: {newest.name} is not of the current step"
    code = run(config, 2)
    return f"{phase}: went on and ended with {code}: {_tail(config)}" if code else None


def nan(bed: Bed, name: str, rng: random.Random, stage: int, precision: str) -> str | None:
    """A loss that isn't finite on one rank in one step: nothing changes on any rank, and the samples are named."""
    victim, bad_step, value = rng.randrange(2), rng.randint(2, 5), rng.choice((float("nan"), float("inf")))
    config = bed.config(
        name, "steps=6", f"deepspeed=zero{stage}", f"precision={precision}"
    )

    def sabotage(mine: Config, rank: int) -> None:
        _multiply_loss(lambda step: value if rank == victim and step == bad_step else 1.0)
        _note_changes(Path(mine.run_dir) / f"changes-{rank}.jsonl")

    if code := run(config, 2, sabotage):
        return f"stage {stage} {precision}: ended with {code}: {_tail(config)}"
    for rank in range(2):
        lines = [json.loads(x) for x in (bed.run_dir(name) / f"changes-{rank}.jsonl").read_text().splitlines()]
        kept = [line["step"] for line in lines if not line["changed"]]
        if kept != [bad_step] or [line["step"] for line in lines if not line["applied"]] != [bad_step]:
            return f"stage {stage} {precision}: rank {rank} kept its state at steps {kept}, wanted {[bad_step]}"
    skipped = [json.loads(x) for x in (bed.run_dir(name) / "skipped.jsonl").read_text().splitlines()]
    guilty = [e["rank"] for e in skipped if e["loss"] in ("nan", "inf", "-inf")]
    if guilty != [victim] or {e["step"] for e in skipped} != {bad_step}:
        return f"stage {stage} {precision}: skipped.jsonl names {skipped}"
    return None


def spike(bed: Bed, name: str, rng: random.Random) -> str | None:
    """Three steps of the plan with a huge loss: back to the checkpoint before, those left out; also if killed then."""
    settings = ("steps=34", "checkpoint.every_steps=8")
    first = rng.randint(25, 27)
    plan = Shards(bed.config(name)).plan(bed.config(name)).from_position(Position())
    guilty = [position for position, _ in islice(plan, first + 2)][-3:]

    def sabotage(mine: Config, rank: int) -> None:
        _multiply_loss(lambda step: 1e3, lambda position: position in guilty)

    code = run(bed.config(name, *settings), 2, sabotage)
    record = bed.run_dir(name) / "left_out.jsonl"
    if code or not record.exists():
        return f"ended with {code}, left out {record.exists()}: {_tail(bed.config(name))}"
    (entry,) = [json.loads(line) for line in record.read_text().splitlines()]
    if entry["back_to"] != 24 or not {tuple(p) for p in entry["positions"]} >= set(guilty):
        return f"left out {entry}, the guilty ones were {guilty}"
    job = Job(bed.config(f"{name}-killed", *settings), 2, sabotage)
    while not job.poll() and not (bed.run_dir(f"{name}-killed") / "left_out.jsonl").exists():
        time.sleep(0.005)
    job.send(signal.SIGKILL)
    job.wait()
    if code := run(bed.config(f"{name}-killed", *settings), 2, sabotage):
        return f"ended with {code} after a kill: {_tail(bed.config(f'{name}-killed'))}"
    differing = differences(outcome(bed.run_dir(name)), outcome(bed.run_dir(f"{name}-killed")))
    return f"a kill after the rollback changes {', '.join(differing)}" if differing else None


def hang(bed: Bed, name: str, rng: random.Random, rank: int) -> str | None:
    """Stop one rank: found within the time-out and two seconds, stacks of the live one on disk, no process left."""
    limit = 4.0
    config = bed.config(name, "steps=1000", f"guard.timeout_s={limit}")
    job = Job(config, 2)
    wanted = rng.randint(3, 8)
    while not job.poll() and len(samples_by_step(bed.run_dir(name))) < wanted:
        time.sleep(0.02)
    stopped, began = time.time(), time.monotonic()
    job.send(signal.SIGSTOP, rank)
    code = job.wait()
    seconds = time.monotonic() - began
    stacks = bed.run_dir(name) / "logs" / f"rank-{1 - rank}.stacks.txt"
    text = stacks.read_text() if stacks.exists() else ""
    if "no progress for" not in text or "trainer.py" not in text or "phase" not in text:
        return f"rank {1 - rank} left no stacks; ended with {code}: {_tail(config)}"
    found = stacks.stat().st_mtime - stopped
    if code != 1 or found > limit + 2.0 or seconds > limit + 12.0:
        return f"ended with {code}, found after {found:.1f} s, gone after {seconds:.1f} s"
    return None


def two_jobs(bed: Bed, name: str, rng: random.Random) -> str | None:
    """A second run in a folder is refused; after kill -9 of the first the folder is free at once."""
    config = bed.config(name, "steps=1000")
    first = Job(config, 1)
    while not first.poll() and not (bed.run_dir(name) / "metrics.jsonl").exists():
        time.sleep(0.05)
    second = Job(config, 1)
    code = second.wait()
    alive = not first.poll()
    first.send(signal.SIGKILL)
    first.wait()
    if code != BAD_INPUT or not alive or f"process {first.pids[0]}" not in _tail(config):
        return f"the second ended with {code}, the first was {'alive' if alive else 'gone'}: {_tail(config)}"
    code = run(bed.config(name, "steps=2"), 1)
    return f"not taken over: {code}: {_tail(config)}" if code else None


def skew(bed: Bed, name: str, rng: random.Random, kind: str) -> str | None:
    """One rank differs: refused before the first step, the rank and the thing named."""
    odd = rng.randrange(3)
    config = bed.config(name)

    def sabotage(mine: Config, rank: int) -> None:
        true = preflight.facts
        names = {"torch": "package torch", "package": "package numpy", "environment": "variable NCCL_ALGO"}

        def wrong(config: Config, device: str, fingerprint: str) -> dict[str, str]:
            return true(config, device, fingerprint) | ({names.get(kind, kind): "odd"} if kind != "config" else {})

        if rank == odd:
            if kind == "config":
                mine.optim.lr *= 2
            sora_assemble().facts = wrong

    code = run(config, 3, sabotage)
    wanted = f"rank {odd} has {'key optim.lr' if kind == 'config' else ''}"
    if code != BAD_INPUT or wanted not in _tail(config) or (bed.run_dir(name) / "ledger").exists():
        return f"{kind}: ended with {code}: {_tail(config)}"
    return None


def sora_assemble() -> Any:
    """The module whose names a sabotage replaces."""
    import sora_train.assemble

    return sora_train.assemble


def damage(source: Path, target: Path, rng: random.Random, kind: str) -> str | None:
    """Damage the newest of two checkpoints of two ranks; the older one must be chosen, and nothing executed."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    older, newest = sorted(target.glob("step-*"))[-2:]
    files = sorted(p for p in newest.iterdir() if p.name != "manifest.json")
    victim = rng.choice(files)
    payload = pickle.dumps(_Payload(target / "executed"))
    if kind in ("flip", "manifest flip"):
        victim = newest / "manifest.json" if kind == "manifest flip" else victim
        data = bytearray(victim.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        victim.write_bytes(data)
    elif kind == "truncate":
        victim.write_bytes(victim.read_bytes()[: rng.randrange(victim.stat().st_size)])
    elif kind == "delete":
        victim.unlink()
    elif kind == "empty":
        victim.write_bytes(b"")
    elif kind == "swapped":
        a, b = newest / "rank-0.safetensors", newest / "rank-1.safetensors"
        data = a.read_bytes()
        a.write_bytes(b.read_bytes())
        b.write_bytes(data)
    elif kind == "stale":
        shutil.copy(older / "rank-1.safetensors", newest)
    elif kind == "no manifest":
        (newest / "manifest.json").unlink()
    elif kind == "pointer to nothing":
        shutil.rmtree(newest)
        newest.symlink_to(target / "gone")
        (target / "latest").write_text(rng.choice(("", "step-99999999", "\0garbage", str(newest))))
    elif kind == "half deleted":
        for file in rng.sample(files, 2):
            file.unlink()
    else:
        victim = newest / "rank-0.safetensors"
        victim.write_bytes(payload)
        if kind == "pickle with manifest":  # by somebody who knows how the manifest is made
            manifest = json.loads((newest / "manifest.json").read_text())
            del manifest["sha256"]
            manifest["files"][victim.name] |= {"size": len(payload), "sha256": checkpoint.sha256(victim)}
            checkpoint.write_json(
                newest / "manifest.json", manifest | {"sha256": checkpoint.digest_of(manifest)}
            )
    chosen = checkpoint.latest_intact(target)
    if (target / "executed").exists():
        return f"{kind}: the payload ran"
    return None if chosen == older else f"{kind}: {chosen.name} was chosen"


def wrong_config(rng: random.Random) -> str | None:
    """A key with a slip of the hand: refused within three seconds of CPU time, and named."""
    keys = [key for key in known_keys() if "." in key and not key.startswith(("data.sources.", "deepspeed."))]
    key = rng.choice(keys)
    place = rng.randrange(key.index(".") + 1, len(key))
    slipped = key[:place] + rng.choice("xqz") + key[place + rng.randrange(2) :]
    began = time.process_time()
    try:
        with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
            build(compose("train", overrides=["experiment=demo_vae", "run_dir=x", f"+{slipped}=1"]))
    except (InputError, HydraException) as error:
        message = str(error)
    else:
        return f"{slipped}=1 was taken"
    seconds = time.process_time() - began
    ends = [n for n in range(place, len(slipped) + 1) if n == len(slipped) or slipped[n] == "."]
    named = any(f"'{slipped[:n]}'" in message for n in ends)  # a wrong group is named without what stands in it
    return None if named and seconds < 3.0 else f"{slipped}: {seconds:.1f} s, {message}"


class _Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.marker,)


def stage_for(ranks: int) -> tuple[str, ...]:
    """The ZeRO stage that a number of ranks is tried with: 0 alone, 3 with two, 1 with three, 2 with four."""
    return (f"deepspeed=zero{(0, 3, 1, 2)[ranks - 1]}",)


def _slow_saves(mine: Config, rank: int) -> None:
    true = checkpoint.write_json

    def slow(path: Path, value: dict[str, Any]) -> dict[str, Any]:
        time.sleep(_WAITS / 2)
        return true(path, value)

    checkpoint.write_json = slow


def _saving(run_dir: Path) -> bool:
    return any((run_dir / "checkpoints").glob(".tmp-step-*"))


def _fill_disk(at: int, lasts: int) -> None:
    """Have this rank's writes to checkpoints fail from the `at`-th on, `lasts` times, with half a file left behind."""
    seen = [0]

    def failing(true: Callable[..., Any], place: int) -> Callable[..., Any]:
        def write(*arguments: Any) -> Any:
            seen[0] += 1
            if at <= seen[0] < at + lasts:
                arguments[place].write_bytes(b"x" * 100)
                raise OSError(errno.ENOSPC, "No space left on device")
            return true(*arguments)

        return write

    checkpoint.save_file = failing(checkpoint.save_file, 1)
    checkpoint.write_json = failing(checkpoint.write_json, 0)


def _signal_in(phase: str, count: int, number: int) -> None:
    """Signal this process when it enters a phase for the `count`-th time."""
    true, seen = watch.Watch.phase, [0]

    def entering(self: watch.Watch, name: str, slow: bool = False) -> None:
        true(self, name, slow)
        if name == phase:
            seen[0] += 1
            if seen[0] == count:
                signal.raise_signal(number)

    watch.Watch.phase = entering  # type: ignore[method-assign]


_here: dict[str, Any] = {}  # what a sabotaged rank knows of the step that it is in


def _multiply_loss(factor: Callable[[int], float], at: Callable[[Any], bool] = lambda position: True) -> None:
    """Multiply this rank's losses by a factor that depends on the step, where its place in the plan says so."""
    agree, backward = Trainer.agree, Engine.backward

    def agreeing(self: Trainer, batch: Any) -> Any:
        _here["factor"] = factor(self.step + 1) if at(batch.position) else 1.0
        return agree(self, batch)

    def going_back(self: Engine, loss_sum: torch.Tensor, weight: float) -> None:
        if _here["factor"] != 1.0:
            loss_sum.data.mul_(_here["factor"])
            loss_sum = loss_sum * _here["factor"]
        backward(self, loss_sum, weight)

    Trainer.agree, Engine.backward = agreeing, going_back  # type: ignore[method-assign]


def _note_changes(path: Path) -> None:
    """Write after every step whether weights, moments or averages changed."""
    judge = Trainer.advance

    def advancing(self: Trainer, batch: Any, own_loss: torch.Tensor, applied: bool) -> Any:
        verdict = judge(self, batch, own_loss, applied)
        now = [
            tensor.clone()
            for f in self.engine.fragments
            for tensor in (f.master, f.exp_avg, f.exp_avg_sq, self.ema.values[f.name])
        ] + [p.data.clone() for p in self.engine.names]
        before = _here.get("tensors")
        changed = before is None or not all(torch.equal(a, b) for a, b in zip(before, now, strict=True))
        _here["tensors"] = now
        with path.open("a") as file:
            file.write(json.dumps({"step": self.step, "changed": changed, "applied": applied}) + "\n")
        return verdict

    Trainer.advance = advancing  # type: ignore[method-assign]


def _tail(config: Config) -> str:
    with suppress(OSError):
        return Path(config.run_dir).with_suffix(".out").read_text()[-1500:]
    return "(no output)"
