"""Planned windows shared by the ranks of a node: the first rank to need one plans it, the others read its file.

The files are in shared memory (or in the temporary folder), and belong to one user and one plan. They only save time:
if a file can't be written or read, each rank plans by itself.
"""

from __future__ import annotations

import atexit
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from sora_train.data.order.visits import Visits

_KEPT = 4  # windows of a plan
_MEMORY = Path("/dev/shm")
Packs = list[list[list[int]]]
Window = tuple[Visits | None, Packs]


class SharedWindows:
    """A folder of planned windows; plans that differ must not share a name. The owner removes it when it exits."""

    def __init__(self, name: str, owner: bool) -> None:
        base = _MEMORY if os.access(_MEMORY, os.W_OK) else Path(tempfile.gettempdir())
        self.folder = base / f"sora_train-plan-{os.getuid()}-{name}"
        self.folder.mkdir(mode=0o700, exist_ok=True)
        if self.folder.stat().st_uid != os.getuid() or self.folder.is_symlink():
            raise PermissionError(f"{self.folder} belongs to someone else; remove it")
        if owner:
            atexit.register(self.remove)

    def get(self, window: str, plan: Callable[[], Window]) -> Window:
        """Read a window that a rank of this node has planned, or plan it and store the result for the other ranks.

        Args:
            window: Name of the window, unique within this folder.
            plan: Computes the window. Called if the file doesn't exist, can't be read or can't be written.
        """
        path = self.folder / f"{window}.npz"
        try:
            with self._locked():
                if path.is_file():
                    return _read(path)
                planned = plan()
                self._write(path, planned)
                return planned
        except (OSError, ValueError, KeyError, EOFError, BadZipFile):  # no room, or a torn file
            return plan()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.folder / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _write(self, path: Path, window: Window) -> None:
        visits, steps = window
        slots = [slot for step in steps for slot in step]
        arrays = {} if visits is None else visits.arrays()
        arrays["items"] = np.array([item for slot in slots for item in slot], dtype=np.int64)
        arrays["ends"] = np.cumsum([len(slot) for slot in slots], dtype=np.int64)
        arrays["steps"] = np.array(len(steps))
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with temporary.open("wb") as file:
                np.savez(file, **arrays)  # type: ignore[arg-type]
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        for old in sorted(self.folder.glob("*.npz"), key=lambda p: p.stat().st_mtime_ns)[:-_KEPT]:
            old.unlink()

    def remove(self) -> None:
        """Remove the folder; a rank that comes later plans for itself."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _read(path: Path) -> Window:
    with np.load(path, allow_pickle=False) as arrays:
        count, items, ends = int(arrays["steps"]), arrays["items"].tolist(), [0, *arrays["ends"].tolist()]
        slots = [items[a:b] for a, b in zip(ends, ends[1:], strict=False)]
        per_step = len(slots) // max(1, count)
        steps = [slots[n * per_step : (n + 1) * per_step] for n in range(count)]
        return (Visits.of_arrays(arrays) if count else None), steps
