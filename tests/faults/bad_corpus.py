"""One run over bad samples of every kind, damaged tars, and media that were altered behind their index."""

from __future__ import annotations

import os
import random
import re
import socket
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sora_train.config.schema import Config
from sora_train.data.index.index import Index, load_index
from sora_train.data.index.make import index_shards
from tests.faults.bad_files import DAMAGES, HARMLESS, MARKER, TARS, Corpus, altered, damaged_tar, hostile_names
from tests.faults.bed import Bed, run
from tests.faults.small_data import (
    QUIET,
    RANKS,
    Found,
    Row,
    damage,
    sources,
    steps_of_an_epoch,
    tail,
    unaccounted,
    video,
    write,
)

_PER_SHARD = 100
_LIBRARIES = re.compile(  # where a rank writes beside its run folder: pixels, plans, what torch compiles and probes
    r"/dev/null|/dev/shm(/sora_train.*)?|/tmp/(sora_train|torchinductor_|tmp\w{8}(/|$)).*|/proc/.*"
)


class Listener:
    """A port of this machine where nobody may call."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=64)
        self._socket.setblocking(False)
        self.port = self._socket.getsockname()[1]

    def calls(self) -> int:
        """Number of calls since the last time."""
        count = 0
        while True:
            try:
                self._socket.accept()[0].close()
            except BlockingIOError:
                return count
            count += 1


class Inputs:
    """Shards with everything wrong with them, and what is wrong with each."""

    def __init__(self, folder: Path, port: int, seed: int) -> None:
        self.folder, self.port, self.rng = folder, port, random.Random(seed)
        self.shards: list[str] = []
        self.kinds: dict[str, str] = {}  # of bad samples, by key
        self.of_tars: dict[str, str] = {}  # of damaged tars, by path
        self.good = [{"mp4": video(n), "txt": b"a block"} for n in range(1, 81)]

    def samples(self, each: int) -> None:
        """So many bad samples of every kind, among good ones."""
        entries = [(f"good-{n}", members) for n, members in enumerate(self.good)]
        for kind, make in Corpus(video(0), self.folder, self.port).samples.items():
            for number in range(each):
                self.kinds[f"{kind}-{number}"] = kind
                entries.append((f"{kind}-{number}", make(self.rng)))
        self.rng.shuffle(entries)
        for n in range(0, len(entries), _PER_SHARD):
            self.shards.append(write(self.folder / f"bad-{n:04d}.tar", entries[n : n + _PER_SHARD]))
        hostile = [(f"{'../' * 12}{self.folder}/{MARKER}", self.good[0]), ("/abs/key", self.good[0])]
        hostile_names(Path(self.shards[0]), hostile)

    def tars(self, count: int) -> None:
        """Damaged tars of four good samples each."""
        for number in range(count):
            samples = [(f"t{number}-{n}", members) for n, members in enumerate(self.good[:4])]
            path = Path(write(self.folder / f"tar-{number:04d}.tar", samples))
            path.write_bytes(damaged_tar(TARS[number % len(TARS)], path.read_bytes(), self.rng))
            self.shards.append(str(path))
            self.of_tars[str(path)] = TARS[number % len(TARS)]

    def to_alter(self, count: int) -> None:
        """Good samples that will be altered, beside some that won't."""
        for first in range(0, count, _PER_SHARD):
            samples = [(f"altered-{n}", self.good[n % 80]) for n in range(first, min(count, first + _PER_SHARD))]
            samples += [(f"beside-{first}-{n}", members) for n, members in enumerate(self.good[:8])]
            self.shards.append(write(self.folder / f"altered-{first:04d}.tar", samples))

    def alter(self, index: Index) -> dict[int, str]:
        """Alter them behind the back of the index; returns how, by row."""
        rows = [row for row, key in enumerate(index.key) if str(key).startswith("altered-")]
        changed = {row: DAMAGES[n % len(DAMAGES)] for n, row in enumerate(rows)}
        damage(index, rows, lambda row, old: altered(changed[row], old, self.rng))
        return changed


def corpus(bed: Bed, each: int, tars: int, flips: int, seed: int) -> Found:
    """Samples of every kind of fault, damaged tars, and media altered behind the index, all in one run."""
    folder, listener = bed.folder / "corpus", Listener()
    inputs = Inputs(folder, listener.port, seed)
    inputs.samples(each)
    inputs.tars(tars)
    inputs.to_alter(flips)
    index_shards(inputs.shards, workers=2)
    index = load_index(inputs.shards)
    changed = inputs.alter(index)
    config = bed.config(
        "corpus-run", sources(inputs.shards), *QUIET, "data.max_bad_fraction=1.0", "data.max_tokens=512",
        "data.decode_timeout_s=20",
    )  # fmt: skip
    config.steps = steps_of_an_epoch(config) + 1
    before = set(folder.rglob("*"))
    if code := run(config, RANKS, _audited):
        return [], [f"the run ended with {code}: {tail(config)}"]
    trained, refused, wrong = unaccounted(Path(config.run_dir), index)
    wrong += _bad_treated(index, inputs.kinds, changed, trained, refused)
    wrong += _tars_explained(index, [n for n, shard in enumerate(inputs.shards) if shard in inputs.of_tars])
    wrong += _left_alone(bed, config, set(folder.rglob("*")) - before, listener)
    return _table(index, inputs, changed, trained), wrong


def _table(index: Index, inputs: Inputs, changed: dict[int, str], trained: Counter[int]) -> list[Row]:
    """A row for each kind of fault."""
    rows, keys = [], [str(key) for key in index.key]
    for kind in dict.fromkeys(inputs.kinds.values()):
        mine = [row for row, key in enumerate(keys) if inputs.kinds.get(key) == kind]
        rows.append(_row(kind, mine, index, trained))
    for kind in TARS:
        shards = [n for n, shard in enumerate(inputs.shards) if inputs.of_tars.get(shard) == kind]
        _, _, *counts = _row(kind, np.flatnonzero(np.isin(index.shard, shards)).tolist(), index, trained)
        rows.append((f"{kind.replace('_', ': ', 1)} (4 samples each)", len(shards), *counts))
    for kind in DAMAGES:
        mine = [row for row in changed if changed[row] == kind]
        rows.append(_row(f"behind the index: {kind}", mine, index, trained))
    return [row for row in rows if row[1]]


def _row(kind: str, rows: list[int], index: Index, trained: Counter[int]) -> Row:
    by_index = sum(not index.usable[row] for row in rows)
    on = sum(trained[row] for row in rows)
    return kind, len(rows), by_index, len(rows) - by_index - on, on


def _bad_treated(
    index: Index, kinds: dict[str, str], changed: dict[int, str], trained: Counter[int], refused: dict[int, str]
) -> list[str]:
    """Bad samples of a kind that can't be used are refused, good ones trained on, altered ones refused as such."""
    wrong = []
    for row, key in enumerate(map(str, index.key)):
        kind = kinds.get(key)
        if kind and kind not in HARMLESS and row in trained:
            wrong.append(f"{key} was trained on")
        if (key.startswith(("good-", "beside-")) or key == "/abs/key") and row not in trained:
            wrong.append(f"{key} was not trained on: {index.refused[row] or refused.get(row)}")
    for row in changed:
        if row in trained or refused.get(row) != "checksum":
            wrong.append(f"{index.key[row]}, altered behind the index, was not refused as that: {refused.get(row)}")
    return wrong


def _tars_explained(index: Index, shards: Sequence[int]) -> list[str]:
    """Check that what a damaged tar lost has a cause: with fewer than four usable samples, something is refused."""
    wrong = []
    for shard in shards:
        mine = index.shard == shard
        if (index.usable & mine).sum() < 4 and not (~index.usable & mine).any():
            wrong.append(f"{index.shards[shard]} lost samples without a word")
    return wrong


def _left_alone(bed: Bed, config: Config, made: set[Path], listener: Listener) -> list[str]:
    """Nothing ran, nobody called, and no rank wrote beside its run folder."""
    wrong = [f"{count} calls at the port"] if (count := listener.calls()) else []
    wrong += [f"{path} was made" for path in made if path.suffix != ".parquet"]
    wrong += ["a payload left its marker"] * bool([*bed.folder.rglob(MARKER)] or Path(MARKER).exists())
    for path in bed.folder.glob(f"{Path(config.run_dir).name}.writes-*"):
        inside, own = str(bed.folder.resolve()), str(Path(config.run_dir).resolve())
        for name in set(path.read_text().splitlines()):
            if not name.startswith(own) and (name.startswith(inside) or not _LIBRARIES.fullmatch(name)):
                wrong.append(f"a rank wrote {name}")
    return wrong


def _audited(config: Config, rank: int) -> None:
    """Have this rank write down the name of every file that it opens to write, makes, moves or links."""
    notes = os.open(f"{config.run_dir}.writes-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            name, mode, flags = arguments
            if not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) or not isinstance(name, str | bytes):
                return
        elif event in ("os.mkdir", "os.rename", "os.link", "os.symlink", "os.truncate"):
            name = arguments[1] if event in ("os.rename", "os.link", "os.symlink") else arguments[0]
        else:
            return
        os.write(notes, os.path.realpath(os.fsdecode(name)).encode() + b"\n")

    sys.addaudithook(hook)
