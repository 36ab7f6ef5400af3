"""Sources of shards: local files, and `https:// s3:// gs:// hf://` through fsspec, with a cache on the node.

Remote members are fetched by byte range, with retries, into a folder that all ranks of a node share (`cache.py`). If
byte ranges are unavailable (a web server that ignores or refuses them, a `pipe:` command that the configuration allows
by name), the whole shard is streamed into that folder once. Cached data is checked against the index's checksums when
it is used.
"""

from __future__ import annotations

import os
import random
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from sora_train.config.schema import DataConfig
from sora_train.core.cli import InputError
from sora_train.data.read.cache import Cache
from sora_train.data.read.commands import is_command, printed, words
from sora_train.data.read.decode import DecodeError, read_member

REMOTE = ("https", "http", "s3", "gs", "hf")
PIPE = "pipe"
_WRITABLE = ("s3", "gs", "hf")
_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*)://")
_IDENTITY = ("ETag", "etag", "md5Hash", "LastModified", "last_modified", "mtime", "blob_id")
_CHUNK = 8 << 20  # bytes of a whole shard fetched at once
_NO_RANGES = (400, 405, 416, 501)  # how web servers refuse a range
T = TypeVar("T")


def scheme(shard: str) -> str | None:
    """The scheme of a remote shard, `pipe` for a command, None for a local path; raises InputError for unknown ones."""
    if is_command(shard):
        return PIPE
    found = _SCHEME.match(shard)
    if not found:
        return None
    name = found.group(1).lower()
    if name not in REMOTE:
        raise InputError(f"shard {shard!r}: no such kind of source; known: local paths, {', '.join(REMOTE)}")
    return name


class NoRanges(Exception):
    """A web server doesn't give a part of a file."""


class Store:
    """Reads ranges of shards, from anywhere. Without a `cache` folder every remote range is fetched each time.

    `options` has keyword arguments for fsspec's file systems by scheme, e.g. `{"s3": {"anon": True}}`; `commands` are
    the programs that `pipe:` shards may run. Raises InputError for other commands, wherever one is named.
    """

    def __init__(
        self,
        cache: Path | None = None,
        cache_bytes: int = 32 << 30,
        options: dict[str, dict[str, Any]] | None = None,
        tries: int = 5,
        timeout_s: float = 60.0,
        commands: Sequence[str] = (),
    ) -> None:
        self.cache = Cache(cache, cache_bytes) if cache else None
        self.options, self.tries, self.timeout_s, self.commands = options or {}, tries, timeout_s, tuple(commands)
        self._systems: dict[tuple[str, bool], Any] = {}
        self._whole: set[str] = set()  # shards whose server gives no ranges
        self._copies: dict[str, str] = {}  # under which names theirs are in the cache
        self._doubted: set[str] = set()  # of them, those that were streamed a second time
        self._renewed: set[str] = set()  # commands whose copy is not older than this store

    @classmethod
    def of(cls, data: DataConfig) -> Store:
        """Build the store of a run's configuration."""
        folder = data.cache.folder or Path(tempfile.gettempdir()) / f"sora_train-{os.getuid()}"
        return cls(Path(folder), int(data.cache.gib * 2**30), data.storage, commands=data.commands)

    def read(self, shard: str, offset: int, size: int) -> bytes:
        """A range of a shard; raises DecodeError (missing, network, io) when retries don't help."""
        if self.cache is None or scheme(shard) is None or self._is_streamed(shard):
            return self.fetch(shard, offset, size)
        data = self.cache.get(_name(shard, offset, size))
        if data is None:
            data = self.fetch(shard, offset, size)
            if shard not in self._whole:
                self.cache.put(_name(shard, offset, size), data)
        return data

    def fetch(self, shard: str, offset: int, size: int) -> bytes:
        """A range of a shard from where it lies, cached or not; of its copy where there are no ranges."""
        if scheme(shard) is None:
            return _retried(lambda: read_member(shard, offset, size), shard, self.tries)
        if not self._is_streamed(shard):
            try:
                return _retried(lambda: self._fetch(shard, offset, size), shard, self.tries)
            except NoRanges:
                self._whole.add(shard)
        return self._of_copy(shard, lambda cache, name: cache.get(name, offset, size))

    def forget(self, shard: str, offset: int, size: int) -> None:
        """Remove a range that differs from the index from the cache. A streamed shard is removed as a whole, once."""
        if self.cache and not self._is_streamed(shard):
            self.cache.drop(_name(shard, offset, size))
        elif self.cache and shard not in self._doubted:
            self._doubted.add(shard)
            self.cache.drop(self._copy(shard))

    def size(self, shard: str) -> int:
        """Bytes of a shard. Raises InputError if it isn't there."""
        if scheme(shard) is None:
            return Path(shard).stat().st_size
        self._renew(shard)
        try:
            if not self._is_streamed(shard):
                stated = _retried(lambda: self._system(shard).info(shard)["size"], shard, self.tries)
                if stated is not None:
                    return int(stated)
                self._whole.add(shard)
            return self._of_copy(shard, lambda cache, name: cache.size(name))
        except DecodeError as error:
            raise InputError(f"shard {shard}: {error}") from error

    def identity(self, shard: str) -> str:
        """Identity of a remote shard, which changes with its content if the server tells; empty for others."""
        if scheme(shard) in (None, PIPE):
            return ""
        try:
            return self._identity(shard)
        except DecodeError as error:
            raise InputError(f"shard {shard}: {error}") from error

    def _identity(self, shard: str) -> str:
        info = _retried(lambda: self._system(shard).info(shard), shard, self.tries)
        known = [str(info[name]) for name in _IDENTITY if name in info]
        return "|".join([str(info.get("size")), *known])

    def put(self, file: str, data: bytes) -> None:
        """Write a remote file. Raises InputError where that can't be done."""
        if scheme(file) not in _WRITABLE:
            raise InputError(f"{file} can't be written; known: {', '.join(_WRITABLE)}")
        try:
            _retried(lambda: self._system(file).pipe_file(file, data), file, self.tries)
        except DecodeError as error:
            raise InputError(f"{file} can't be written: {error.detail}") from error

    def list(self, pattern: str) -> list[str]:
        """Remote shards that match a glob pattern, sorted; a pattern without wildcards is returned as it is."""
        kind = scheme(pattern)
        if kind == PIPE:
            words(pattern, self.commands)
            return [pattern]
        if not any(c in pattern for c in "*?["):
            return [pattern]
        try:
            names = _retried(lambda: self._system(pattern).glob(pattern), pattern, self.tries)
        except DecodeError as error:
            raise InputError(f"shards {pattern}: {error}") from error
        return sorted(n if _SCHEME.match(n) else f"{kind}://{n}" for n in map(str, names))

    @contextmanager
    def local(self, shard: str) -> Iterator[Path]:
        """The shard as a local file: itself, or a copy as it is now that is removed afterwards."""
        if scheme(shard) is None:
            yield Path(shard)
            return
        self._renew(shard)
        folder = self.cache.prepare() if self.cache else None
        with tempfile.TemporaryDirectory(prefix=".shard-", dir=folder) as place:
            copy, end = Path(place) / "shard.tar", self.size(shard)
            if self._is_streamed(shard):
                self._of_copy(shard, lambda cache, name: cache.link(name, copy) or None)
            else:
                with copy.open("wb") as file:
                    for offset in range(0, end, _CHUNK):
                        file.write(self.fetch(shard, offset, min(_CHUNK, end - offset)))
            yield copy

    def _is_streamed(self, shard: str) -> bool:
        return scheme(shard) == PIPE or shard in self._whole

    def _renew(self, shard: str) -> None:
        """Before a shard of a command is indexed: remove its cached output, which may be out of date."""
        if self.cache and scheme(shard) == PIPE and shard not in self._renewed:
            self._renewed.add(shard)
            self.cache.drop(shard)

    def _copy(self, shard: str) -> str:
        """The name of a streamed shard's copy in the cache: of a server's, another one when it is replaced there."""
        if shard not in self._copies:
            self._copies[shard] = shard if scheme(shard) == PIPE else f"{shard}\n{self._identity(shard)}"
        return self._copies[shard]

    def _of_copy(self, shard: str, use: Callable[[Cache, str], T | None]) -> T:
        """Use the copy of a shard that can only be read from its beginning; stream it where it isn't here (any more).

        Raises DecodeError where it can't be streamed, InputError where the cache is too small for it.
        """
        if scheme(shard) == PIPE:
            words(shard, self.commands)
        if self.cache is None:
            raise InputError(f"{shard} can only be read from its beginning; set data.cache.folder for a copy of it")
        cache, name = self.cache, self._copy(shard)
        for _ in range(3):
            found = use(cache, name)
            if found is not None:
                return found
            _retried(lambda: cache.fill(name, lambda: self._streamed(shard)), shard, self.tries)
        found = use(cache, name)
        if found is None:
            raise DecodeError("io", f"{shard}: its copy leaves the cache before it is read; raise data.cache.gib")
        return found

    def _streamed(self, shard: str) -> Iterator[bytes]:
        """All of a shard from its beginning, in pieces."""
        if scheme(shard) == PIPE:
            yield from printed(words(shard, self.commands), self.timeout_s)
            return
        with self._system(shard, patient=True).open(shard, "rb", block_size=0) as file:
            while piece := file.read(_CHUNK):
                yield piece

    def _fetch(self, shard: str, offset: int, size: int) -> bytes:
        """One try at one range. A short answer is an error: a connection that broke gives one."""
        system = self._system(shard)
        if scheme(shard) in ("http", "https"):
            data = _web_range(system, shard, offset, size)
        else:
            exact = {"cache_type": "none"} if scheme(shard) == "hf" else {}  # which would read 5 MiB ahead each time
            data = bytes(system.cat_file(shard, start=offset, end=offset + size, **exact))
        if len(data) != size:
            raise OSError(f"{len(data)} of {size} bytes at {offset}")
        return data

    def _system(self, shard: str, patient: bool = False) -> Any:
        """The file system of a shard's scheme. Raises InputError if its package isn't installed.

        With `patient`, the HTTP time-out applies to each read from the socket, not to the whole transfer.
        """
        kind = scheme(shard)
        assert kind is not None
        if (kind, patient) not in self._systems:
            import fsspec

            fresh = {"skip_instance_cache": True, "use_listings_cache": False}
            options = {**_timeouts(kind, self.timeout_s, patient), **self.options.get(kind, {}), **fresh}
            try:
                self._systems[kind, patient] = fsspec.filesystem(kind, **options)
            except ImportError as error:
                message = f"{kind}:// needs another package ({error}); install sora_train[storage]"
                raise InputError(message) from error
        return self._systems[kind, patient]


def _web_range(system: Any, url: str, offset: int, size: int) -> bytes:
    """A range from a web server; raises NoRanges where it gives all or nothing, before it has given all."""
    try:
        with system.open(url, "rb", block_size=max(1, size), cache_type="none", size=offset + size) as file:
            file.seek(offset)
            data = bytes(file.read(size))
    except Exception as error:  # aiohttp's is of no common kind
        status = getattr(error, "status", 0)
        if status == 404:
            raise FileNotFoundError(url) from error
        if "range requests" in str(error) or status in _NO_RANGES:
            raise NoRanges from error
        raise
    if size and not data:  # what becomes of status 416
        raise NoRanges
    return data


def _timeouts(kind: str, seconds: float, patient: bool) -> dict[str, Any]:
    if kind in ("http", "https"):
        import aiohttp

        total, read = (None, seconds) if patient else (seconds, None)
        limit = aiohttp.ClientTimeout(total=total, sock_connect=min(10.0, seconds), sock_read=read)
        return {"client_kwargs": {"timeout": limit}}
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
        except (InputError, NoRanges):
            raise
        except Exception as error:  # clients raise their own kinds for time-outs, resets and server errors
            if number == tries - 1:
                kind = "network" if scheme(shard) else "io"
                raise DecodeError(kind, f"{shard}: {type(error).__name__}: {error}"[:300]) from error
            time.sleep(min(10.0, 0.2 * 2**number) * random.uniform(0.5, 1.0))
    raise AssertionError("tries is at least 1")


def _name(shard: str, offset: int, size: int) -> str:
    return f"{shard}\n{offset}\n{size}"
