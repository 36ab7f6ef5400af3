"""Files of JSON lines that grow with a run, each line with its `step`, which only rises: read and cut from their end.

A resume needs the lines after its checkpoint and no others. Those are the last ones, so what it reads doesn't grow with
the run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

_BLOCK = 1 << 16  # bytes read first; twice as many each time it wasn't enough

Entry = dict[str, Any]


def entries(path: Path) -> Iterator[Entry]:
    """The whole lines of a file, one at a time; none where there is no file. Torn ones are left out."""
    if path.is_file():
        with path.open("rb") as file:
            yield from filter(None, map(_entry, file))


def entries_after(path: Path, step: int) -> list[Entry]:
    """The lines of later steps, read from the end of the file."""
    if not path.is_file():
        return []
    with path.open("rb") as file:
        return [entry for line in _tail(file, step)[1] if (entry := _entry(line))]


def cut_after(path: Path, step: int, stays: Callable[[Entry], bool] = lambda entry: False) -> None:
    """Remove the lines of later steps, and torn ones among them; those that `stays` names are kept.

    Works in place, so a full disk doesn't hinder it, and a kill inside leaves nothing that the next cut doesn't remove.
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
    """The lines behind the last whole one of `step` or an earlier step, and where they begin."""
    start = end = file.seek(0, os.SEEK_END)
    block = _BLOCK
    while start > 0:
        start = max(0, end - block)
        file.seek(start)
        lines = file.read(end - start).splitlines(keepends=True)
        first = 0 if start == 0 else 1  # the rest of a line that begins before
        for number in range(len(lines) - 1, first - 1, -1):
            entry = _entry(lines[number])
            if entry and entry["step"] <= step:
                return end - sum(map(len, lines[number + 1 :])), lines[number + 1 :]
        if start == 0:
            return 0, lines
        block *= 2
    return 0, []


def _entry(line: bytes) -> Entry | None:
    """A whole line; None for one that a kill or a full disk has torn."""
    try:
        entry = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and "step" in entry else None
