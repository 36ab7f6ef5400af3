"""JSON Lines files that a run appends to (metrics, ledger), read and truncated from their end.

Every line has a `step`, and steps never decrease. A resume needs only the lines after its checkpoint, which are the
last ones, so reading from the end costs the same however long the run has been.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

_BLOCK = 1 << 16  # bytes of the first read; doubled until the wanted line is found

Entry = dict[str, Any]


def entries(path: Path) -> Iterator[Entry]:
    """Yield the complete lines of a file, parsed; nothing if the file doesn't exist. Incomplete lines are skipped."""
    if path.is_file():
        with path.open("rb") as file:
            yield from filter(None, map(_entry, file))


def entries_after(path: Path, step: int) -> list[Entry]:
    """Read the parsed lines of steps after `step`, from the end of the file."""
    if not path.is_file():
        return []
    with path.open("rb") as file:
        return [entry for line in _tail(file, step)[1] if (entry := _entry(line))]


def cut_after(path: Path, step: int, stays: Callable[[Entry], bool] = lambda entry: False) -> None:
    """Remove the lines of steps after `step`, and incomplete lines; lines for which `stays` is true are kept.

    Truncates in place, so it works on a full disk; if it is killed halfway, calling it again finishes the job.
    """
    if not path.is_file():
        return
    with path.open("r+b") as file:
        offset, tail = _tail(file, step)
        kept = [line for line in tail if (entry := _entry(line)) and stays(entry)]
        if kept != tail:
            file.seek(offset)
            file.writelines(kept)
            file.truncate()
            file.flush()
            os.fsync(file.fileno())


def _tail(file: BinaryIO, step: int) -> tuple[int, list[bytes]]:
    """Byte offset and raw lines of everything after the last complete line with a step of at most `step`."""
    start = end = file.seek(0, os.SEEK_END)
    block = _BLOCK
    while start > 0:
        start = max(0, end - block)
        file.seek(start)
        lines = file.read(end - start).splitlines(keepends=True)
        first = 0 if start == 0 else 1  # the block may begin in the middle of a line
        for number in range(len(lines) - 1, first - 1, -1):
            entry = _entry(lines[number])
            if entry and entry["step"] <= step:
                return end - sum(map(len, lines[number + 1 :])), lines[number + 1 :]
        if start == 0:
            return 0, lines
        block *= 2
    return 0, []


def _entry(line: bytes) -> Entry | None:
    """Parse a line; None for one that was only partly written (after a kill, or on a full disk)."""
    try:
        entry = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and "step" in entry else None
