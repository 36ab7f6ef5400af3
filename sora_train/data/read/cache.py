"""Cache of a node: a folder shared by its ranks, of byte ranges and whole shards, with a limit to its size.

Files are renamed into place under one lock; when the cache is full, the least recently used ones are removed. The
kernel releases the locks of a process that dies, so a killed process blocks nobody.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from sora_train.core.cli import InputError

_FULL_TO = 0.9  # share of the cache that is left after old files made room
_ARRIVING = "arriving"  # folder of shards under way


class Cache:
    """A folder of byte ranges shared by processes. Writes are atomic; the least recently used files are evicted."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit

    def prepare(self) -> Path:
        """The folder, made now if it isn't there. Raises InputError for one that belongs to another user."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if self.folder.stat().st_uid != os.getuid():
            raise InputError(f"data.cache.folder={self.folder} belongs to another user; choose one of your own")
        return self.folder

    def get(self, name: str, offset: int = 0, size: int = -1) -> bytes | None:
        """The bytes under a name, or a range of them; None if they aren't here."""
        path = self._path(name)
        try:
            with path.open("rb") as file:
                file.seek(offset)
                data = file.read(size)
            os.utime(path)
        except FileNotFoundError:
            return None
        return data

    def size(self, name: str) -> int | None:
        """Number of bytes under a name; None if they aren't here."""
        try:
            return self._path(name).stat().st_size
        except FileNotFoundError:
            return None

    def link(self, name: str, place: Path) -> bool:
        """Give a cached file a second name that eviction ignores. False if it is not cached."""
        try:
            os.link(self._path(name), place)
        except FileNotFoundError:
            return False
        return True

    def put(self, name: str, data: bytes) -> None:
        """Store bytes under a name, evicting old files if needed. Bytes above 90% of the limit are not stored."""

        def write(path: Path) -> None:
            temporary = path.with_name(f".{path.name}")
            temporary.write_bytes(data)
            temporary.replace(path)

        if len(data) <= self.limit * _FULL_TO:
            self._keep(name, len(data), write)

    def fill(self, name: str, pieces: Callable[[], Iterator[bytes]]) -> None:
        """Store data that arrives in pieces. If several processes want it, one fetches it and the others wait.

        Incomplete data doesn't count towards the limit. Raises InputError for data larger than most of the cache.
        """
        arriving = self.prepare() / _ARRIVING
        arriving.mkdir(exist_ok=True, mode=0o700)
        path = self._path(name)
        temporary = arriving / path.name
        with temporary.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if path.exists():
                return
            try:
                size = 0
                with temporary.open("wb") as file:
                    for piece in pieces():
                        size += len(piece)
                        if size > self.limit * _FULL_TO:
                            what, gib = name.splitlines()[0], self.limit / 2**30
                            raise InputError(f"{what} has more bytes than data.cache.gib={gib:g} can keep; raise it")
                        file.write(piece)
                self._keep(name, size, temporary.replace)
            finally:
                temporary.unlink(missing_ok=True)

    def drop(self, name: str) -> None:
        """Remove the file of a name. Its bytes count towards the limit until the next eviction."""
        self._path(name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        digest = hashlib.sha256(name.encode()).hexdigest()
        return self.folder / digest[:2] / digest

    def _keep(self, name: str, size: int, place: Callable[[Path], object]) -> None:
        """Free space for a file of this size, count it, and move it into place."""
        path = self._path(name)
        with self._locked() as total:
            if path.exists():
                return
            text = total.read()
            used = int(text) if text.isdigit() else self._evict(self.limit)
            if used + size > self.limit:
                used = self._evict(int(self.limit * _FULL_TO) - size)
            total.seek(0)
            total.write(f"{used + size:020d}".encode())  # counted before it is there: a crash counts too much
            total.flush()
            path.parent.mkdir(exist_ok=True)
            place(path)

    @contextmanager
    def _locked(self) -> Iterator[BinaryIO]:
        """Hold the cache alone; yields the file that has its size. The kernel unlocks it when a process dies."""
        descriptor = os.open(self.prepare() / "total", os.O_RDWR | os.O_CREAT, 0o600)
        with os.fdopen(descriptor, "r+b") as total:
            fcntl.flock(total, fcntl.LOCK_EX)
            yield total

    def _evict(self, room: int) -> int:
        """Remove the least recently used files until at most `room` bytes are left; returns these. Needs the lock."""
        self._sweep()
        files = []
        for path in self.folder.glob("??/*"):
            try:
                state = path.stat()
            except FileNotFoundError:  # dropped by another process just now
                continue
            if path.name.startswith("."):
                path.unlink(missing_ok=True)  # left by a process that was killed while it wrote
            else:
                files.append((state.st_mtime_ns, state.st_size, path))
        used = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if used <= room:
                break
            path.unlink(missing_ok=True)
            used -= size
        return used

    def _sweep(self) -> None:
        """Remove incomplete files of processes that have ended, recognised by their locks being free."""
        for path in (self.folder / _ARRIVING).glob("*"):
            if path.suffix == ".lock":
                continue
            with path.with_suffix(".lock").open("w") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                path.unlink(missing_ok=True)
