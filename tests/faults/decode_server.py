"""Forks decode children for the ranks of a campaign, so that a start doesn't import the decoders anew.

The children run `sora_train.data.read.decode_child` as ever, but are forked from this process instead of started from a
fresh interpreter; it has no torch either. `serve` starts it and has `pool.py` of this process, and of
its forks, ask it.

    python -m tests.faults.decode_server DESCRIPTOR      a listening socket
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

from sora_train.config.schema import DECODERS
from sora_train.data.read import decode_child as child
from sora_train.data.read.back_ends import load_error

_address = ""


def serve() -> subprocess.Popen[bytes]:
    """Start the server; it ends with this process."""
    global _address
    from sora_train.data.read import pool

    listener = socket.socket(socket.AF_UNIX)
    _address = f"\0sora_train-decode-{os.getpid()}"
    listener.bind(_address)
    listener.listen(64)
    command = [sys.executable, "-m", "tests.faults.decode_server", str(listener.fileno())]
    server = subprocess.Popen(command, pass_fds=(listener.fileno(),), stdin=subprocess.PIPE)
    listener.close()
    pool.subprocess = SimpleNamespace(  # type: ignore[attr-defined]
        Popen=Forked, PIPE=subprocess.PIPE, DEVNULL=subprocess.DEVNULL
    )
    return server


class Forked:
    """A decode child of the server, with as much of Popen as the pool uses."""

    def __init__(self, command: list[str], pass_fds: tuple[int, ...], **_: Any) -> None:
        (requests, own_requests), (own_answers, answers) = os.pipe(), os.pipe()
        with socket.socket(socket.AF_UNIX) as server:
            server.connect(_address)
            socket.send_fds(server, [command[-1].encode()], [requests, answers, *pass_fds])
            self.pid = int(server.recv(32))
        os.close(requests)
        os.close(answers)
        self.stdin, self.stdout = os.fdopen(own_requests, "wb"), os.fdopen(own_answers, "rb")
        self.returncode: int | None = None
        self._pidfd: int | None = None
        with suppress(ProcessLookupError):
            self._pidfd = os.pidfd_open(self.pid)

    def poll(self) -> int | None:
        """None while it lives."""
        return self._ended(0)

    def wait(self) -> int | None:
        """Wait for its end."""
        return self._ended(None)

    def kill(self) -> None:
        """End it."""
        if self._pidfd is not None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def __del__(self) -> None:
        """Let go of it."""
        if self._pidfd is not None:
            os.close(self._pidfd)

    def _ended(self, timeout: float | None) -> int | None:
        """Tell whether it has; several threads of a pool may ask at once."""
        if self._pidfd is None or select.select([self._pidfd], [], [], timeout)[0]:
            self.returncode = -signal.SIGKILL  # the server's child: its code isn't ours to know
        return self.returncode


def main() -> None:
    """Answer until the campaign is gone."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it ends with the campaign
    for decoder in DECODERS:
        load_error(decoder)
    listener = socket.socket(fileno=int(sys.argv[1]))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children are reaped by the kernel
    while True:
        connection, _ = listener.accept()
        options, descriptors, _, _ = socket.recv_fds(connection, 1 << 16, 3)
        pid = os.fork()
        if pid == 0:
            listener.close()
            connection.close()
            os.setsid()
            os.dup2(descriptors[0], 0)
            os.dup2(descriptors[1], 1)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            sys.argv[1:] = [str(descriptors[2]), options.decode()]
            with suppress(BaseException):
                child.main()
            os._exit(0)
        connection.send(str(pid).encode())
        connection.close()
        for descriptor in descriptors:
            os.close(descriptor)


if __name__ == "__main__":
    main()
