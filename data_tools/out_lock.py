"""One command at a time on an output folder."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sora_train.core.cli import InputError
from sora_train.core.outputs import usable

_FILE = ".lock"


@contextmanager
def alone_on(out: Path) -> Iterator[None]:
    """Context that holds the lock of an output folder.

    The operating system releases the lock also if the process is killed; the lock file remains. Raises InputError if
    another process holds the lock, or if nothing can be written.
    """
    with usable(out, "out"):
        descriptor = os.open(out / _FILE, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"another command is at work in out={out}; wait for its end, or stop it") from error
        yield
    finally:
        os.close(descriptor)
