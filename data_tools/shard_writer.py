"""Atomic writer of shards, and the journal of their contents."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import webdataset as wds

from sora_train.core.cli import InputError
from sora_train.core.outputs import usable

VERSION = 2
Members = list[tuple[str, bytes]]  # of one sample: extension and bytes


class Mark(NamedTuple):
    """Fingerprint of a sample's file and captions, to detect changes since they were written to a shard."""

    size: int
    mtime_ns: int
    media: str  # hash of the file
    text: str  # hash of the member with captions; empty without one


class Journal:
    """`build.jsonl` of an output folder: a line on how it is built, then a line for each finished shard.

    A shard counts as finished once its line is written. One that a kill left renamed but without a line is written
    again with the same content. A second line of a shard replaces the first.
    """

    def __init__(self, out: Path, made_with: dict[str, Any]) -> None:
        """Open or begin the journal of `out`; InputError if the folder can't be used or was built in another way."""
        self.out, self.path = out, out / "build.jsonl"
        self.shards: dict[str, dict[str, Mark]] = {}  # samples of each, in order
        self.notes: dict[str, Any] = {}
        head = {"version": VERSION} | made_with
        with usable(out, "out"):
            out.mkdir(parents=True, exist_ok=True)
            lines = self._whole_lines()
        if not lines:
            if any(out.rglob("*.tar")):
                raise InputError(f"{out} holds shards but no build.jsonl; choose another out=")
            self._append(head)
        if lines and lines[0] != head:
            raise InputError(f"{out} was built with {lines[0]}, this is {head}; choose another out=")
        for line in lines[1:]:
            if "shard" in line:
                self.shards[line["shard"]] = {name: Mark(*mark) for name, mark in line["samples"].items()}
            else:
                self.notes |= line
        gone = [name for name in self.shards if not (out / name).is_file()]
        if gone:
            raise InputError(f"{out / gone[0]} is in build.jsonl but not there; put it back, or choose another out=")
        for unfinished in out.rglob("*.tar.tmp"):
            unfinished.unlink()

    @property
    def samples(self) -> dict[str, Mark]:
        """Marks of all samples that are in a shard, by name."""
        return {name: mark for samples in self.shards.values() for name, mark in samples.items()}

    def add(self, shard: str, samples: dict[str, Mark]) -> None:
        """Record a finished shard and its samples."""
        self._append({"shard": shard, "samples": samples})
        self.shards[shard] = dict(samples)

    def note(self, name: str, value: Any) -> None:
        """Append a named JSON value to the journal; later runs of the command read it from `notes`."""
        self._append({name: value})
        self.notes[name] = value

    def _append(self, entry: dict[str, Any]) -> None:
        with self.path.open("ab") as file:
            file.write(json.dumps(entry).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def _whole_lines(self) -> list[Any]:
        """The journal's entries; half a line, left by a kill, is cut off."""
        if not self.path.exists():
            return []
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            os.truncate(self.path, len(whole))
        try:
            return [json.loads(line) for line in whole.splitlines()]
        except ValueError as error:
            raise InputError(f"{self.path} is damaged ({error}); choose another out=") from error


def opened_journal(out: Path) -> Journal:
    """Open the journal of an existing folder, whatever options it was built with. Raises InputError without one."""
    path = out / "build.jsonl"
    if not path.is_file():
        raise InputError(f"{out} has no {path.name}")
    head = json.loads(path.read_bytes().partition(b"\n")[0])
    return Journal(out, {name: value for name, value in head.items() if name != "version"})


class ShardWriter:
    """Writes samples into `shard-NNNNNN.tar`, a new one when the next sample would exceed `limit` bytes.

    `folder` is a folder below that of the journal, such as `validation`. With `name`, all samples go into the shard of
    that name, which is replaced.
    """

    def __init__(self, journal: Journal, limit: float, folder: str = "", name: str | None = None) -> None:
        self.journal, self.limit, self.folder, self.name = journal, limit, folder, name
        self._samples: dict[str, Mark] = {}
        self._bytes = 0
        self._file: BinaryIO | None = None
        self._tar: wds.TarWriter | None = None
        self._shard = ""

    def add(self, key: str, sample: str, mark: Mark, members: Iterable[tuple[str, bytes]]) -> None:
        """Write one sample's members in the order given; `sample` and its mark are noted in the journal."""
        parts = list(members)
        size = sum(len(data) for _, data in parts)
        if self._samples and self._bytes + size > self.limit:
            self.close()
        if self._tar is None:
            self.open()
        assert self._tar is not None
        for extension, data in parts:  # one call each: TarWriter sorts the members of a call
            self._tar.write({"__key__": key, extension: data})
        self._samples[sample] = mark
        self._bytes += size

    def close(self) -> None:
        """Finish the current shard, if one is open: on disk, then under its name, then in the journal."""
        if self._tar is None or self._file is None:
            return
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        final = self.journal.out / self._shard
        final.with_suffix(".tar.tmp").replace(final)
        self.journal.add(self._shard, self._samples)
        self._samples, self._bytes, self._file, self._tar = {}, 0, None, None

    def open(self) -> None:
        """Begin a shard, which is written even if no sample is added."""
        count = sum(str(Path(shard).parent) == (self.folder or ".") for shard in self.journal.shards)
        self._shard = self.name or str(Path(self.folder) / f"shard-{count:06d}.tar")
        path = (self.journal.out / self._shard).with_suffix(".tar.tmp")
        path.parent.mkdir(exist_ok=True)
        self._file = path.open("wb")
        self._tar = wds.TarWriter(self._file, encoder=False, mtime=0)
