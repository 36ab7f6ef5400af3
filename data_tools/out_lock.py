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
    """Hold an output folder for this process. Raises InputError where another one holds it, or nothing can be written.

    The system gives it free when the process ends, however it ends; the file stays.
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
