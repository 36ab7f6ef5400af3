"""The other trials of `bad_input.py`: bad decoders, shares of bad samples, samples left out later, memory.

Each makes shards, trains on them with real ranks, and returns rows for the table and what was not as it should be.
"""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from sora_train.config.schema import Config
from sora_train.core.batch import Clip
from sora_train.core.cli import BAD_INPUT
from sora_train.data import loader
from sora_train.data.index.index import load_index
from sora_train.data.index.make import index_shards
from sora_train.data.read import pool
from sora_train.training.state.checkpoint_format import latest_intact, read_state
from tests.faults.bad_decoder import BOTH, CRASH, EAT, SPIN
from tests.faults.bad_files import altered
from tests.faults.bed import Bed, Job, run, samples_by_step
from tests.faults.small_data import (
    QUIET,
    RANKS,
    Found,
    damage,
    ledger,
    picture,
    sources,
    steps_of_an_epoch,
    tail,
    unaccounted,
    video,
    write,
)

_DEADLINE_S = 10  # enough to fill 2 GiB on a busy machine


def decoders(bed: Bed, endings: Sequence[str], seed: int) -> Found:
    """Decoders that spin holding the interpreter's lock, die, or eat memory: the other clips are to the bit those of
    a run with decoders that behave, and no answer is waited for longer than the deadline."""
    named = {"spin": SPIN, "crash": CRASH, "eat": EAT, "all spin": BOTH + SPIN, "all crash": BOTH + CRASH}
    good = [(f"good-{n}", {"mp4": video(n), "txt": b"a block"}) for n in range(24)]
    bad = [
        (f"bad-{word.replace(' ', '_')}", {"mp4": video(99, ending=named[word]), "txt": b"a block"}) for word in endings
    ]
    entries = [*good, *bad]
    random.Random(seed).shuffle(entries)
    half = len(entries) // 2
    folder = bed.folder / "decoders"
    shards = [write(folder / "0.tar", entries[:half]), write(folder / "1.tar", entries[half:])]
    index_shards(shards, workers=1)
    index = load_index(shards)
    options = (
        sources(shards), *QUIET, "data.max_tokens=32", "data.max_bad_fraction=1.0", "data.decode_memory_gib=2",
        f"data.decode_timeout_s={_DEADLINE_S}",
    )  # fmt: skip
    undisturbed, disturbed = (bed.config(f"decoders-{name}", *options) for name in ("behaving", "bad"))
    undisturbed.steps = disturbed.steps = steps_of_an_epoch(undisturbed)
    job = Job(undisturbed, RANKS, _watched, then=[disturbed])
    if code := job.wait():
        return [], [f"a run ended with {code}: {job.log.read_text()[-3000:]}"]
    theirs, ours = _clips(undisturbed), _clips(disturbed)
    _, refused, wrong = unaccounted(Path(disturbed.run_dir), index)
    causes = {str(index.key[row]): cause for row, cause in refused.items()}
    wanted = {"bad-eat": "memory", "bad-all_spin": "timeout", "bad-all_crash": "crash"}
    if causes != {key: cause for key, cause in wanted.items() if key in dict(bad)}:
        wrong.append(f"refused: {causes}")
    if {k: v for k, v in ours.items() if "good" in k} != {k: v for k, v in theirs.items() if "good" in k}:
        wrong.append("the other clips are not those of a run with decoders that behave")
    if len(theirs) != len(entries) or len(ours) != len(entries) - len(causes):
        wrong.append(f"{len(theirs)} and {len(ours)} clips of {len(entries)}")
    longest = max(json.loads(line)["seconds"] for path in _notes(disturbed) for line in path.read_text().splitlines())
    if longest > _DEADLINE_S + 2:
        wrong.append(f"a decoder was waited for {longest:.1f} s, with a deadline of {_DEADLINE_S}")
    return [(f"decoder: {word}", 1, 0, int(f"bad-{word.replace(' ', '_')}" in causes),
             int(f"bad-{word.replace(' ', '_')}" not in causes)) for word in endings], wrong  # fmt: skip


_CLIP, _ASK, _MODULE = loader.Loader._clip, pool._Child.ask, pool._Child.module


def _notes(config: Config) -> Iterator[Path]:
    yield from Path(config.run_dir).parent.glob(f"{Path(config.run_dir).name}.clips-*.jsonl")


def _clips(config: Config) -> dict[str, str]:
    """Result of each sample: a hash of its pixels by key."""
    lines = [json.loads(line) for path in _notes(config) for line in path.read_text().splitlines()]
    return {line["key"]: line["pixels"] for line in lines if "pixels" in line}


def _watched(config: Config, rank: int) -> None:
    """Have this rank write down a hash of each clip and how long each answer took; bad decoders in the run of that
    name."""
    notes = Path(f"{config.run_dir}.clips-{rank}.jsonl")

    def note(**line: object) -> None:
        with notes.open("a") as file:
            file.write(json.dumps({"seconds": 0.0, **line}) + "\n")

    def clip(self: loader.Loader, *arguments: Any) -> Clip:
        made = _CLIP(self, *arguments)
        pixels = np.ascontiguousarray(made.video_TCHW.numpy()).tobytes()
        note(key=made.key, pixels=hashlib.sha256(pixels).hexdigest())
        return made

    def ask(self: pool._Child, *arguments: Any) -> dict[str, Any]:
        began = time.monotonic()
        try:
            return _ASK(self, *arguments)
        finally:
            note(seconds=time.monotonic() - began)

    loader.Loader._clip, pool._Child.ask = clip, ask  # type: ignore[method-assign]
    bad = Path(config.run_dir).name.endswith("-bad")
    pool._Child.module = "tests.faults.bad_decoder" if bad else _MODULE


def shares(bed: Bed, samples: int, seed: int) -> Found:
    """One sample in twenty bad never stops a run (two epochs of it), every second one does: on all ranks at the same
    step, with the cause in the reason."""
    rows, wrong, rng = [], [], random.Random(seed)
    for share in (0.05, 0.5):
        name = f"share-{share:.0%}".replace("%", "")
        entries = [(f"{n:05d}", {"png": picture(n), "txt": b"a block"}) for n in range(samples)]
        shard = write(bed.folder / name / "0.tar", entries)
        index_shards([shard], workers=1)
        index = load_index([shard])
        bad = rng.sample(range(samples), round(share * samples))
        damage(index, bad, lambda row, old: altered("one bit", old, rng))
        config = bed.config(name + "-run", sources([shard]), *QUIET, "data.max_tokens=64")
        config.steps = 2 * steps_of_an_epoch(config)
        code, run_dir = run(config, RANKS), Path(config.run_dir)
        ended = {max(line["step"] for line in lines) for lines in _by_rank(run_dir)}
        reason = json.loads((run_dir / "exit.json").read_text())["reason"]
        took = sum(len(line["samples"]) for line in ledger(run_dir))
        refused = sum(len(line["refused"]) for line in ledger(run_dir))
        rows.append((f"share of {share:.0%}, two epochs: ended with {code} after step {max(ended)} of {config.steps}",
                     took + refused, 0, refused, took))  # fmt: skip
        stopped = code == BAD_INPUT and "samples could not be used" in reason and "checksum" in reason
        if (share > 0.2 and not stopped) or (share < 0.2 and (code or refused != 2 * len(bad))) or len(ended) != 1:
            wrong.append(f"{share:.0%} bad: ended with {code} after steps {ended}: {reason}")
    return rows, wrong


def _by_rank(run_dir: Path) -> list[list[dict[str, Any]]]:
    return [[json.loads(line) for line in p.read_text().splitlines()] for p in run_dir.glob("ledger/*.jsonl")]


def left_out(bed: Bed, seed: int) -> Found:
    """`data.drop_refused`: what was refused comes no more from a later epoch on, everything else once an epoch; the
    same where the run was stopped and went on with another number of ranks."""
    rng = random.Random(seed)
    entries = [(f"{n:05d}", {"png": picture(n), "txt": b"a block"}) for n in range(60)]
    shards = [write(bed.folder / "dropped" / f"{n}.tar", entries[n::3]) for n in range(3)]
    index_shards(shards, workers=1)
    index = load_index(shards)
    bad = set(rng.sample(range(60), 7))
    damage(index, sorted(bad), lambda row, old: altered("one bit", old, rng))
    options = (sources(shards), "data.validation=[]", "data.prefetch_steps=2", "data.max_tokens=16",
               "data.drop_refused=true", "checkpoint.every_steps=100000")  # fmt: skip
    whole, halves = bed.config("dropped-whole", *options), bed.config("dropped-halves", *options)
    epoch = steps_of_an_epoch(whole)
    whole.steps = 4 * epoch
    first = bed.config("dropped-halves", *options)
    first.steps, halves.steps = epoch + epoch // 2, 4 * epoch
    for config, ranks, then in ((whole, RANKS, [first]), (halves, 1, [])):
        if code := Job(config, ranks, then=then).wait():
            return [], [f"a run ended with {code}: {tail(config)}"]
    wrong, lines = [], ledger(Path(whole.run_dir))
    if samples_by_step(Path(whole.run_dir)) != samples_by_step(Path(halves.run_dir)):
        wrong.append("the run that was stopped took other samples")
    amendments = read_state(latest_intact(Path(whole.run_dir) / "checkpoints"))["amendments"]
    without = {number: {row for since, rows in amendments if since <= number for row in rows} for number in range(9)}
    last = max(line["position"][0] for line in lines)
    asked = Counter((line["position"][0], row) for line in lines for row in
                    [*line["samples"], *(r["sample"] for r in line["refused"])])  # fmt: skip
    if without[2] != bad or without[8] != bad:
        wrong.append(f"left out are {amendments}, refused were {sorted(bad)}")
    for number in range(last):
        expected = set(range(60)) - without[number]
        if {row for e, row in asked if e == number} != expected or any(asked[number, row] > 1 for row in expected):
            wrong.append(f"epoch {number} has not each of {len(expected)} samples once")
    refused = sum(len(line["refused"]) for line in lines)
    return [(f"data.drop_refused, {last} epochs, 60 samples", 7, 0, refused, 0)], wrong


def memory(bed: Bed, clips: int, seed: int) -> Found:
    """A rank and its decoder keep their size over many clips, some of them bad."""
    rng = random.Random(seed)
    entries = [(f"{n:05d}", {"mp4": video(n % 50), "txt": b"a block"}) for n in range(250)]
    shard = write(bed.folder / "memory" / "0.tar", entries)
    index_shards([shard], workers=1)
    damage(load_index([shard]), rng.sample(range(250), 12), lambda row, old: altered("one bit", old, rng))
    config = bed.config("memory-run", sources([shard]), *QUIET, "data.max_tokens=100")
    config.steps = clips // 250 * steps_of_an_epoch(config)
    if code := run(config, RANKS, _weighed):
        return [], [f"the run ended with {code}: {tail(config)}"]
    rows, wrong = [], []
    for path in sorted(Path(config.run_dir).parent.glob("memory-run.sizes-*")):
        sizes = np.array([json.loads(line) for line in path.read_text().splitlines()]) / 2**20
        quarter, last = sizes[len(sizes) // 4 : len(sizes) // 2].mean(0), sizes[-len(sizes) // 4 :].mean(0)
        grown = last - quarter
        rows.append((f"rank {path.name[-1]}: {quarter[0]:.1f} MiB, then {last[0]:.1f}; its decoder {quarter[1]:.1f}, "
                     f"then {last[1]:.1f} (mean of second and last quarter)", clips, 0, 0, 0))  # fmt: skip
        if grown.max() > 16:
            wrong.append(f"{path.name}: grew by {grown} MiB")
    took = sum(len(line["samples"]) + len(line["refused"]) for line in ledger(Path(config.run_dir)))
    if took < clips:
        wrong.append(f"{took} clips of {clips}")
    return rows, wrong


def _weighed(config: Config, rank: int) -> None:
    """Have this rank write down its size and its decoder's at every step."""
    notes, process, land = Path(f"{config.run_dir}.sizes-{rank}"), psutil.Process(), loader.Loader._land

    def landed(self: loader.Loader, *arguments: Any) -> loader.Step:
        step = land(self, *arguments)
        sizes = [process.memory_info().rss, sum(child.memory_info().rss for child in process.children())]
        with notes.open("a") as file:
            file.write(json.dumps(sizes) + "\n")
        return step

    loader.Loader._land = landed  # type: ignore[method-assign]
