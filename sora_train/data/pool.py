"""A pool of decode processes that can be killed: one thread and one child each, a deadline for every request.

The child (`decode.py`) is a fresh interpreter without torch, without inherited descriptors other than its pipes and
the shared memory, and with an environment that holds no credentials. A child that misses the deadline is killed and
replaced; the request is tried once more before it counts as failed.
"""

from __future__ import annotations

import json
import mmap
import os
import selectors
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from sora_train.data.decode import DecodeError

_KEPT_VARIABLES = ("PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "HOME", "TMPDIR", "VIRTUAL_ENV", "PYTHONPATH")
_RECYCLE_AFTER = 5000  # requests; decoders leak a little
_ROOT = Path(__file__).parents[2]


class Pool:
    """`workers` decode processes. Use as a context manager, or call `close`."""

    def __init__(self, workers: int = 2, timeout_s: float = 60.0, memory_bytes: int = 8 << 30) -> None:
        self.workers, self.timeout_s, self.memory_bytes = workers, timeout_s, memory_bytes
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="decode")
        self._local = threading.local()
        self._children: list[_Child] = []

    def probe(self, path: str, extension: str, offset: int = 0, size: int = -1) -> Future[dict[str, Any]]:
        """Frames, fps, width, height and crc32 of a video or image in a file (or in part of it).

        The future raises DecodeError with a one-word cause if the file isn't usable.
        """
        request = {"op": "probe", "path": path, "offset": offset, "size": size, "crc32": None, "extension": extension}
        return self._threads.submit(self._ask, request, 0)

    def decode(
        self,
        path: str,
        extension: str,
        member: tuple[int, int, int],
        frames: list[int],
        resize: tuple[int, int],
        crop: tuple[int, int, int, int],
    ) -> Future[np.ndarray]:
        """Frames `(T, H, W, 3)` uint8 of a member (offset, size, crc32), resized, then cut to (top, left, H, W).

        The future raises DecodeError with a one-word cause if the sample isn't usable.
        """
        offset, size, crc32 = member
        request = {
            "op": "decode",
            "path": path,
            "offset": offset,
            "size": size,
            "crc32": crc32,
            "extension": extension,
            "frames": frames,
            "resize": resize,
            "crop": crop,
        }
        return self._threads.submit(self._ask, request, len(frames) * crop[2] * crop[3] * 3)

    def close(self) -> None:
        """Kill the children and drop what waits."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for child in self._children:
            child.close()
        self._threads.shutdown(wait=True)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, request: dict[str, Any], nbytes: int) -> Any:
        child = getattr(self._local, "child", None)
        if child is None:
            child = self._local.child = _Child(self.memory_bytes)
            self._children.append(child)
        try:
            reply = child.ask(request, nbytes, self.timeout_s)
        except _Gone:
            reply = child.ask_again(request, nbytes, self.timeout_s)
        if "cause" in reply:
            raise DecodeError(reply["cause"], reply["detail"])
        return child.pixels(reply["shape"]) if request["op"] == "decode" else reply


class _Gone(Exception):
    """The child died or was killed while it worked on a request."""


class _Child:
    """One decode process, started on first use and again whenever it has been killed."""

    def __init__(self, memory_limit: int) -> None:
        self.memory_limit, self.asked = memory_limit, 0
        folder = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        self.memory = tempfile.TemporaryFile(prefix="sora_train_", dir=folder)  # noqa: SIM115 (unlinked at once: nothing to leak)
        self.process: subprocess.Popen[bytes] | None = None
        self._closed, self._lock = False, threading.Lock()

    def ask(self, request: dict[str, Any], nbytes: int, timeout_s: float) -> dict[str, Any]:
        """Send a request and wait for its answer; raises _Gone if none comes in time."""
        process = self._running()
        if os.fstat(self.memory.fileno()).st_size < nbytes:
            os.posix_fallocate(self.memory.fileno(), 0, nbytes)  # a full /dev/shm is an error here, not a SIGBUS later
        assert process.stdin and process.stdout
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError as error:
            self.kill()
            raise _Gone("died") from error
        line, deadline = b"", time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    self.kill()
                    raise _Gone(f"no answer within {timeout_s:.0f} s")
                part = os.read(process.stdout.fileno(), 1 << 16)
                if not part:
                    self.kill()
                    raise _Gone(f"died with {process.returncode}")
                line += part
        self.asked += 1
        return json.loads(line)

    def ask_again(self, request: dict[str, Any], nbytes: int, timeout_s: float) -> dict[str, Any]:
        """Ask a fresh child; if it goes too, the sample is at fault."""
        try:
            return self.ask(request, nbytes, timeout_s)
        except _Gone as error:
            return {
                "cause": "timeout" if "no answer" in str(error) else "crash",
                "detail": f"the decoder {error}, twice",
            }

    def pixels(self, shape: list[int]) -> np.ndarray:
        """A copy of the frames that the child left in the shared memory."""
        count = int(np.prod(shape))
        with mmap.mmap(self.memory.fileno(), count, prot=mmap.PROT_READ) as view:
            return np.frombuffer(view, np.uint8, count).reshape(shape).copy()

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
        environment["OMP_NUM_THREADS"] = "1"
        descriptor = self.memory.fileno()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "sora_train.data.decode", str(descriptor), str(self.memory_limit)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # decord prints raw bytes of bad files
            pass_fds=(descriptor,),
            env=environment,
            start_new_session=True,  # a Ctrl-C at the terminal is the parent's to handle
        )
        self.asked = 0
        return self.process
