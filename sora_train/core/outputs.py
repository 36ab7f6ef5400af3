"""Outputs that can't be written: a full disk, missing permissions, a file in place of a folder."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sora_train.core.cli import InputError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_BARRED = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG,
)  # fmt: skip


@contextmanager
def usable(path: Path, key: str) -> Iterator[None]:
    """Context that turns OS errors of writing into an InputError, which names file, cause and the option to change.

    Args:
        path: File or folder that is written.
        key: Option that named it, e.g. `run_dir`.
    """
    try:
        yield
    except OSError as error:
        what = f"{error.filename or path} can't be used: {error.strerror}"
        if error.errno in _FULL:
            raise InputError(f"{what}; make room where {key}={path} lies, and give the command again") from error
        if error.errno in _BARRED:
            raise InputError(f"{what}; choose another {key} than {path}, or mend that") from error
        raise
