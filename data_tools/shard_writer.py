"""Atomic writer of shards, and the journal of their contents."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import webdataset as wds

from sora_train.core.cli import InputError

VERSION = 1


class Journal:
    """`build.jsonl` of an output folder: a line on how it is built, then a line for each finished shard.

    A shard counts once its line is there; one that was renamed but not yet noted is written again, the same.
    """

    def __init__(self, out: Path, made_with: dict[str, Any]) -> None:
        """Open or begin the journal of `out`; InputError if the folder can't be used or was built in another way."""
        self.out, self.path = out, out / "build.jsonl"
        self.shards: list[str] = []
        self.files: dict[str, str] = {}  # relative path -> shard
        head = {"version": VERSION} | made_with
        try:
            out.mkdir(parents=True, exist_ok=True)
            lines = self._whole_lines()
        except OSError as error:
            raise InputError(f"cannot use out={out}: {error.strerror}") from error
        if not lines:
            if any(out.glob("*.tar")):
                raise InputError(f"{out} holds shards but no build.jsonl; choose another out=")
            self._append(head)
        for line in lines[1:]:
            self._take(line["shard"], line["files"])
        if lines and lines[0] != head:
            raise InputError(f"{out} was built with {lines[0]}, this is {head}; choose another out=")
        gone = [name for name in self.shards if not (out / name).is_file()]
        if gone:
            raise InputError(f"{out / gone[0]} is in build.jsonl but not there; put it back, or choose another out=")
        for unfinished in out.glob("*.tar.tmp"):
            unfinished.unlink()

    def add(self, shard: str, files: list[str]) -> None:
        """Note a finished shard and the files in it."""
        self._append({"shard": shard, "files": files})
        self._take(shard, files)

    def _take(self, shard: str, files: list[str]) -> None:
        self.shards.append(shard)
        self.files |= dict.fromkeys(files, shard)

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


class ShardWriter:
    """Writes samples into `shard-NNNNNN.tar`, a new one when the next sample would exceed `limit` bytes."""

    def __init__(self, journal: Journal, limit: int) -> None:
        self.journal, self.limit = journal, limit
        self._files: list[str] = []
        self._bytes = 0
        self._file: BinaryIO | None = None
        self._tar: wds.TarWriter | None = None

    def add(self, key: str, file: str, members: Iterable[tuple[str, bytes]]) -> None:
        """Write one sample's members (extension, bytes) in the order given; `file` is noted in the journal."""
        parts = list(members)
        size = sum(len(data) for _, data in parts)
        if self._files and self._bytes + size > self.limit:
            self.close()
        if self._tar is None:
            self._file = self._path(".tar.tmp").open("wb")
            self._tar = wds.TarWriter(self._file, encoder=False, mtime=0)
        for extension, data in parts:  # one call each: TarWriter sorts the members of a call
            self._tar.write({"__key__": key, extension: data})
        self._files.append(file)
        self._bytes += size

    def close(self) -> None:
        """Finish the current shard, if one is open: on disk, then under its name, then in the journal."""
        if self._tar is None or self._file is None:
            return
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        final = self._path(".tar")
        self._path(".tar.tmp").replace(final)
        self.journal.add(final.name, self._files)
        self._files, self._bytes, self._file, self._tar = [], 0, None, None

    def _path(self, suffix: str) -> Path:
        return self.journal.out / f"shard-{len(self.journal.shards):06d}{suffix}"
