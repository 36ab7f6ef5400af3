"""Pool of decode processes: one thread and one child process each, with a deadline for every request.

The child (`decode_child.py`) is a fresh interpreter without torch, without inherited descriptors except its pipes and
the shared memory, without network, and with an environment without credentials: bytes of remote shards are fetched here
and passed to it. A child that misses the deadline or dies is replaced and the request repeated, the last time without
the first decoder, before it counts as failed.

Longer than most files here, because pool and child share one protocol.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import selectors
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from sora_train.config.schema import DataConfig
from sora_train.core.cli import InputError
from sora_train.data.read.decode import AS_STORED, LIMITS, STEADY, Conversion, DecodeError, Limits, Track
from sora_train.data.read.store import Store, scheme

_KEPT_VARIABLES = ("PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TMPDIR", "VIRTUAL_ENV", "PYTHONPATH")
_RECYCLE_AFTER = 5000  # requests; decoders leak a little
_ROOT = Path(__file__).parents[3]
_PIECE = 16 << 20  # bytes of pixels handed over at once; containers often have no more than 64 MiB of shared memory
# glibc hands large memory back to the kernel and asks for it anew, page by page: that is half of the time of a probe
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(128 << 20)}
_PAUSES = (0.5, 2.0)  # seconds before a read that failed is tried again
T = TypeVar("T")
Probed = dict[str, Any] | DecodeError  # the index's figures of a member, or why there are none


class Pool:
    """`workers` decode processes. Use as a context manager, or call `close`.

    Futures raise DecodeError with a one-word cause where a sample isn't usable, and InputError where none of the
    `decoders` can be loaded on this machine.
    """

    def __init__(
        self,
        workers: int = 2,
        timeout_s: float = 60.0,
        memory_bytes: int = 8 << 30,
        decoders: Sequence[str] = ("decord", "pyav"),
        limits: Limits = LIMITS,
        store: Store | None = None,
        *,
        conversion: Conversion = AS_STORED,
    ) -> None:
        self.workers, self.timeout_s, self.memory_bytes = workers, timeout_s, memory_bytes
        self.decoders, self.limits, self.store = tuple(decoders), limits, store or Store()
        self.conversion = conversion
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="decode")
        self._local = threading.local()
        self._children: list[_Child] = []

    @classmethod
    def of(cls, data: DataConfig, store: Store | None = None) -> Pool:
        """Build the pool of a run's configuration."""
        limits = Limits(data.limits.pixels, data.limits.frames, data.limits.bytes)
        memory = int(data.decode_memory_gib * 2**30)
        conversion, store = Conversion(data.deinterlace, data.tone_map), store or Store.of(data)
        return cls(data.workers, data.decode_timeout_s, memory, data.decoders, limits, store, conversion=conversion)

    def probe(
        self, path: str, extension: str, offset: int = 0, size: int = -1, *, pixels: bool = True, whole: bool = False
    ) -> Future[dict[str, Any]]:
        """The index's figures and the crc32 of a video or image in a file (or in part of it); see `probe.py`."""
        return self._threads.submit(self._ask, _probing((path, extension, offset, size), pixels, whole))

    def probe_all(
        self, members: Sequence[tuple[str, str, int, int]], pixels: bool, whole: bool = False
    ) -> Future[list[Probed]]:
        """Probe several local members (path, extension, offset, size) in one message; errors are returned, not raised.

        They share one deadline. Where it passes, or the child dies, each is tried again by itself.
        """
        return self._threads.submit(self._ask_all, [_probing(member, pixels, whole) for member in members])

    def decode(
        self,
        path: str,
        extension: str,
        member: tuple[int, int, int | None],
        frames: Sequence[float],
        resize: tuple[int, int],
        crop: tuple[int, int, int, int],
        *,
        track: Track = STEADY,
    ) -> Future[np.ndarray]:
        """Frames `(T, H, W, 3)` uint8 of a member (offset, size, crc32), resized, then cut to (top, left, H, W).

        `frames` are numbers as `source_frames` gives them, ascending. A crc32 of None isn't compared.
        """
        offset, size, crc32 = member
        request = {
            "op": "decode", "path": path, "offset": offset, "size": size, "crc32": crc32, "extension": extension,
            "frames": frames, "resize": resize, "crop": crop, "track": track,
        }  # fmt: skip
        return self._threads.submit(self._ask, request)

    def submit(self, work: Callable[..., T], *arguments: Any) -> Future[T]:
        """Run a short function in a thread of the pool, queued with the decode requests."""
        return self._threads.submit(work, *arguments)

    def load_errors(self) -> dict[str, str]:
        """Why each decoder can't be loaded here; empty for those that can."""
        return self._threads.submit(self._ask, {"op": "decoders", "path": ""}).result()["errors"]

    def close(self) -> None:
        """Kill the children and drop waiting requests."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for child in self._children:
            child.close()
        self._threads.shutdown(wait=True)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _child(self) -> _Child:
        child: _Child | None = getattr(self._local, "child", None)
        if child is None:
            child = self._local.child = _Child(self)
            self._children.append(child)
        return child

    def _ask_all(self, requests: list[dict[str, Any]]) -> list[Probed]:
        try:
            replies = self._child().ask({"op": "many", "requests": requests}, None, self.timeout_s)["replies"]
        except _Gone:
            replies = [{"cause": "io"}] * len(requests)
        found: list[Probed] = []
        for request, reply in zip(requests, replies, strict=True):
            try:
                if reply.get("cause") in ("io", "memory", "no_decoder"):  # which may do better, or say more, alone
                    reply = self._ask(request)
                elif "cause" in reply:
                    raise DecodeError(reply["cause"], reply["detail"])
                found.append(reply)
            except DecodeError as error:
                found.append(error)
        return found

    def _ask(self, request: dict[str, Any]) -> Any:
        child = self._child()
        handed = self._fetched(request)
        reply = self._answer(child, request, handed)
        if reply.get("cause") == "checksum" and handed is not None:  # the copy in the cache may be at fault
            self.store.forget(request["path"], request["offset"], request["size"])
            reply = self._answer(child, request, self._fetched(request))
        for pause in _PAUSES:
            if reply.get("cause") == "io":
                time.sleep(pause)
                reply = self._answer(child, request, handed)
        if reply.get("cause") == "no_decoder":
            raise InputError(f"none of data.decoders={list(self.decoders)} can be loaded: {reply['detail']}")
        if "cause" in reply:
            raise DecodeError(reply["cause"], reply["detail"])
        return reply["pixels"] if request["op"] == "decode" else reply

    def _fetched(self, request: dict[str, Any]) -> bytes | None:
        """The bytes of a remote member; None for a local one, which the child reads itself."""
        if scheme(request["path"]) is None:
            return None
        return self.store.read(request["path"], request["offset"], request["size"])

    def _answer(self, child: _Child, request: dict[str, Any], handed: bytes | None) -> dict[str, Any]:
        """Send the request to a child, and to new ones if it dies; a request that no child survives is refused."""
        spares = [False, False, True] if request["op"] == "decode" and len(self.decoders) > 1 else [False, False]
        for spare in spares:
            try:
                return child.ask({**request, "spare": spare}, handed, self.timeout_s)
            except _Gone as error:
                last = error
        cause = "timeout" if "no answer" in str(last) else "crash"
        return {"cause": cause, "detail": f"the decoder {last}, {'twice' if len(spares) == 2 else 'three times'}"}


class _Gone(Exception):
    """The child died or was killed while it worked on a request."""


class _Child:
    """One decode process, started on first use and again whenever it has been killed."""

    module = "sora_train.data.read.decode_child"

    def __init__(self, pool: Pool) -> None:
        self.pool, self.asked = pool, 0
        self.memory = _shared_memory("/dev/shm" if os.access("/dev/shm", os.W_OK) else None)
        self.process: subprocess.Popen[bytes] | None = None
        self._closed, self._lock = False, threading.Lock()

    def ask(self, request: dict[str, Any], handed: bytes | None, timeout_s: float) -> dict[str, Any]:
        """Send a request and wait for its answer, pixels and all; raises _Gone if none comes in time."""
        out, piece = None, 0
        if request["op"] == "decode":
            frame = request["crop"][2] * request["crop"][3] * 3
            out = np.empty((len(request["frames"]), request["crop"][2], request["crop"][3], 3), np.uint8)
            piece = max(1, min(len(out), _PIECE // frame))
            self._reserve(piece * frame)
        if handed is not None:
            self._reserve(len(handed))
        process = self._running()
        if handed is not None:
            os.pwrite(self.memory.fileno(), handed, 0)
            request = {**request, "size": len(handed)}
        self._write(process, json.dumps({**request, "handed": handed is not None, "piece": piece}).encode())
        deadline = time.monotonic() + timeout_s
        while True:
            reply = json.loads(self._line(process, deadline, timeout_s))
            if out is None or "cause" in reply:
                break
            part = out[reply["first"] : reply["first"] + reply["frames"]]
            with mmap.mmap(self.memory.fileno(), part.nbytes, prot=mmap.PROT_READ) as view:
                part[:] = np.frombuffer(view, np.uint8, part.size).reshape(part.shape)
            if not reply["more"]:
                reply["pixels"] = out
                break
            self._write(process, b"taken")
        self.asked += len(request.get("requests", (1,)))
        return reply

    def kill(self) -> None:
        """End the process now, whatever it does."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def close(self) -> None:
        """End the process for good: the request that it works on fails, and isn't tried again."""
        with self._lock:
            self._closed = True
            self.kill()

    def _write(self, process: subprocess.Popen[bytes], line: bytes) -> None:
        assert process.stdin
        try:
            process.stdin.write(line + b"\n")
            process.stdin.flush()
        except BrokenPipeError as error:
            self.kill()
            raise _Gone("died") from error

    def _line(self, process: subprocess.Popen[bytes], deadline: float, timeout_s: float) -> bytes:
        assert process.stdout
        line = b""
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    self.kill()
                    raise _Gone(f"gave no answer within {timeout_s:.0f} s")
                part = os.read(process.stdout.fileno(), 1 << 16)
                if not part:
                    self.kill()
                    raise _Gone(f"died with {process.returncode}")
                line += part
        return line

    def _reserve(self, nbytes: int) -> None:
        """Make the shared memory large enough; where /dev/shm is full it becomes a file on disk."""
        if os.fstat(self.memory.fileno()).st_size >= nbytes:
            return
        try:
            os.posix_fallocate(self.memory.fileno(), 0, nbytes)  # a full /dev/shm is an error here, not a SIGBUS later
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            self.kill()  # the next child gets the new file
            self.memory.close()
            self.memory = _shared_memory(None)
            try:
                os.posix_fallocate(self.memory.fileno(), 0, nbytes)
            except OSError as full:
                raise DecodeError("shared_memory", f"no room for {nbytes} bytes: {full.strerror}") from full

    def _running(self) -> subprocess.Popen[bytes]:
        with self._lock:
            if self._closed:
                raise _Gone("is closed")
            return self._started()

    def _started(self) -> subprocess.Popen[bytes]:
        if self.process is not None and self.process.poll() is None and self.asked < _RECYCLE_AFTER:
            return self.process
        self.kill()
        environment = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
        environment |= {"OMP_NUM_THREADS": "1", **_ALLOCATOR}
        descriptor, pool = self.memory.fileno(), self.pool
        options = {
            "memory_bytes": pool.memory_bytes, "decoders": pool.decoders, "limits": pool.limits._asdict(),
            "conversion": pool.conversion._asdict(),
        }  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, "-m", self.module, str(descriptor), json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # until the child listens to its decoders itself
            pass_fds=(descriptor,),
            env=environment,
            start_new_session=True,  # a Ctrl-C at the terminal is the parent's to handle
        )
        self.asked = 0
        return self.process


def _probing(member: tuple[str, str, int, int], pixels: bool, whole: bool) -> dict[str, Any]:
    path, extension, offset, size = member
    about = {"path": path, "extension": extension, "offset": offset, "size": size, "crc32": None}
    return {"op": "probe", "pixels": pixels, "whole": whole, **about}


def _shared_memory(folder: str | None) -> Any:
    """An open file without a name: nothing to leak, whoever is killed."""
    return tempfile.TemporaryFile(prefix="sora_train_", dir=folder)
