"""Where shards come from: local files, and `https:// s3:// gs:// hf://` through fsspec, with a cache on the node.

Remote members are fetched by byte range, with retries, into a folder that all ranks of a node share and that never
grows beyond its size. What is cached is checked against the index's checksums when it is used. Commands in shard names
(`pipe:`) are refused.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import random
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from sora_train.cli import InputError
from sora_train.config import DataConfig
from sora_train.data.decode import DecodeError, read_member

REMOTE = ("https", "http", "s3", "gs", "hf")
_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*)://")
_IDENTITY = ("ETag", "etag", "md5Hash", "LastModified", "last_modified", "mtime")
_CHUNK = 8 << 20  # bytes of a whole shard fetched at once
_FULL_TO = 0.9  # share of the cache that is left after old files made room
T = TypeVar("T")


def scheme(shard: str) -> str | None:
    """The scheme of a remote shard, None for a local path. Raises InputError for commands and unknown schemes."""
    if shard.lower().startswith("pipe:"):
        raise InputError(f"shard {shard!r} is a command; commands in shard names are not run")
    found = _SCHEME.match(shard)
    if not found:
        return None
    name = found.group(1).lower()
    if name not in REMOTE:
        raise InputError(f"shard {shard!r}: no such kind of source; known: local paths, {', '.join(REMOTE)}")
    return name


class Store:
    """Reads ranges of shards, from anywhere. Without a `cache` folder every remote range is fetched each time.

    `options` has keyword arguments for fsspec's file systems by scheme, e.g. `{"s3": {"anon": True}}`.
    """

    def __init__(
        self,
        cache: Path | None = None,
        cache_bytes: int = 32 << 30,
        options: dict[str, dict[str, Any]] | None = None,
        tries: int = 5,
        timeout_s: float = 60.0,
    ) -> None:
        self.cache = Cache(cache, cache_bytes) if cache else None
        self.options, self.tries, self.timeout_s = options or {}, tries, timeout_s
        self._systems: dict[str, Any] = {}
        self._whole: set[str] = set()  # shards whose server can't read ranges

    @classmethod
    def of(cls, data: DataConfig) -> Store:
        """The store that a run's configuration asks for."""
        folder = data.cache.folder or Path(tempfile.gettempdir()) / f"sora_train-{os.getuid()}"
        return cls(Path(folder), int(data.cache.gib * 2**30), data.storage)

    def read(self, shard: str, offset: int, size: int) -> bytes:
        """A range of a shard; raises DecodeError (missing, network, io) when retries don't help."""
        if self.cache is None or scheme(shard) is None:
            return self.fetch(shard, offset, size)
        whole = shard in self._whole
        data = self.cache.get(shard, offset, size) if whole else self.cache.get(_name(shard, offset, size))
        if data is None:
            data = self.fetch(shard, offset, size)
            if shard not in self._whole:
                self.cache.put(_name(shard, offset, size), data)
        return data

    def fetch(self, shard: str, offset: int, size: int) -> bytes:
        """A range of a shard from where it lies, cached or not."""
        work = read_member if scheme(shard) is None else self._fetch
        return _retried(lambda: work(shard, offset, size), shard, self.tries)

    def forget(self, shard: str, offset: int, size: int) -> None:
        """Drop a range from the cache: it has turned out not to be what was indexed."""
        if self.cache:
            self.cache.drop(shard if shard in self._whole else _name(shard, offset, size))

    def size(self, shard: str) -> int:
        """Bytes of a shard. Raises InputError if it isn't there."""
        if scheme(shard) is None:
            return Path(shard).stat().st_size
        try:
            return _retried(lambda: int(self._system(shard).info(shard)["size"]), shard, self.tries)
        except DecodeError as error:
            raise InputError(f"shard {shard}: {error}") from error

    def identity(self, shard: str) -> str:
        """What changes when a remote shard is replaced, as far as its server says; empty for a local file."""
        if scheme(shard) is None:
            return ""
        try:
            info = _retried(lambda: self._system(shard).info(shard), shard, self.tries)
        except DecodeError as error:
            raise InputError(f"shard {shard}: {error}") from error
        known = [str(info[name]) for name in _IDENTITY if name in info]
        return "|".join([str(info.get("size")), *known])

    def list(self, pattern: str) -> list[str]:
        """Remote shards that match a glob pattern, sorted; a pattern without wildcards stands for itself."""
        kind = scheme(pattern)
        if not any(c in pattern for c in "*?["):
            return [pattern]
        try:
            names = _retried(lambda: self._system(pattern).glob(pattern), pattern, self.tries)
        except DecodeError as error:
            raise InputError(f"shards {pattern}: {error}") from error
        return sorted(n if _SCHEME.match(n) else f"{kind}://{n}" for n in map(str, names))

    @contextmanager
    def local(self, shard: str) -> Iterator[Path]:
        """The shard as a local file: itself, or a copy that is removed afterwards."""
        if scheme(shard) is None:
            yield Path(shard)
            return
        folder = self.cache.prepare() if self.cache else None
        with tempfile.NamedTemporaryFile(prefix=".shard-", suffix=".tar", dir=folder) as copy:
            end = self.size(shard)
            for offset in range(0, end, _CHUNK):
                copy.write(self.fetch(shard, offset, min(_CHUNK, end - offset)))
            copy.flush()
            yield Path(copy.name)

    def _fetch(self, shard: str, offset: int, size: int) -> bytes:
        """One try at one range. A short answer is an error: a connection that broke gives one.

        A server that can't read ranges sends the whole shard, which is kept in the cache, and read from there.
        """
        data = bytes(self._system(shard).cat_file(shard, start=offset, end=offset + size))
        if len(data) > size:
            self._whole.add(shard)
            if self.cache:
                self.cache.put(shard, data)
            data = data[offset : offset + size]
        if len(data) != size:
            raise OSError(f"{len(data)} of {size} bytes at {offset}")
        return data

    def _system(self, shard: str) -> Any:
        """The file system of a shard's scheme; raises InputError where its package isn't installed."""
        kind = scheme(shard)
        assert kind is not None
        if kind not in self._systems:
            import fsspec

            fresh = {"skip_instance_cache": True, "use_listings_cache": False}
            options = {**_timeouts(kind, self.timeout_s), **self.options.get(kind, {}), **fresh}
            try:
                self._systems[kind] = fsspec.filesystem(kind, **options)
            except ImportError as error:
                message = f"{kind}:// needs another package ({error}); install sora_train[storage]"
                raise InputError(message) from error
        return self._systems[kind]


def _timeouts(kind: str, seconds: float) -> dict[str, Any]:
    if kind in ("http", "https"):
        import aiohttp

        return {"client_kwargs": {"timeout": aiohttp.ClientTimeout(total=seconds, sock_connect=min(10.0, seconds))}}
    if kind == "s3":
        return {"config_kwargs": {"connect_timeout": min(10.0, seconds), "read_timeout": seconds}}
    return {}


def _retried(work: Callable[[], T], shard: str, tries: int) -> T:
    """Do it, again after a failure that may pass, waiting longer each time; raises DecodeError in the end."""
    for number in range(tries):
        try:
            return work()
        except (FileNotFoundError, PermissionError) as error:
            raise DecodeError("missing", f"{shard}: {type(error).__name__}") from error
        except InputError:
            raise
        except Exception as error:  # clients raise their own kinds for time-outs, resets and server errors
            if number == tries - 1:
                kind = "network" if scheme(shard) else "io"
                raise DecodeError(kind, f"{shard}: {type(error).__name__}: {error}"[:300]) from error
            time.sleep(min(10.0, 0.2 * 2**number) * random.uniform(0.5, 1.0))
    raise AssertionError("tries is at least 1")


class Cache:
    """A folder of byte ranges shared by processes: files appear whole, the oldest used go when it is full."""

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

    def put(self, name: str, data: bytes) -> None:
        """Keep bytes under a name, after making room; what is larger than most of the cache is not kept."""
        path = self._path(name)
        if len(data) > self.limit * _FULL_TO:
            return
        with self._locked() as total:
            if path.exists():
                return
            text = total.read()
            used = int(text) if text.isdigit() else self._evict(self.limit)
            if used + len(data) > self.limit:
                used = self._evict(int(self.limit * _FULL_TO) - len(data))
            total.seek(0)
            total.write(f"{used + len(data):020d}".encode())  # counted before it is there: a crash counts too much
            total.flush()
            path.parent.mkdir(exist_ok=True)
            temporary = path.with_name(f".{path.name}")
            temporary.write_bytes(data)
            temporary.replace(path)

    def drop(self, name: str) -> None:
        """Forget a name; its bytes stay counted until the next eviction counts anew."""
        self._path(name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        digest = hashlib.sha256(name.encode()).hexdigest()
        return self.folder / digest[:2] / digest

    @contextmanager
    def _locked(self) -> Iterator[BinaryIO]:
        """Hold the cache alone; yields the file that has its size. The kernel unlocks it when a process dies."""
        descriptor = os.open(self.prepare() / "total", os.O_RDWR | os.O_CREAT, 0o600)
        with os.fdopen(descriptor, "r+b") as total:
            fcntl.flock(total, fcntl.LOCK_EX)
            yield total

    def _evict(self, room: int) -> int:
        """Remove the files longest unused until at most `room` bytes are left; returns how many are. Under the lock."""
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


def _name(shard: str, offset: int, size: int) -> str:
    return f"{shard}\n{offset}\n{size}"
