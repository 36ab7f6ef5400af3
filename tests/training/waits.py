"""Finds what would make the host wait for its device, on a machine without one.

The device is torch's `meta`: tensors there are of another device than the host's, kernels give shapes and no numbers,
and autograd runs as ever. Host tensors are real, so what is read from them is right, and what is read from the device
shows as one of these operations (on a GPU each of them waits until the queued work is done):

- one whose answer or whose shape depends on numbers, by torch's own tags (`.item()`, `bool()`, `nonzero`, ...)
- indexing by a mask, or by an index that lies on the host
- a copy to the host that isn't said to be `non_blocking`
- a copy from the host that isn't, or that comes from memory that isn't page-locked: out of a list, or of a tensor that
  neither came that way (`pinned`) nor goes through `batch.send`, which locks it

An operation that goes through `out=`, or that a kernel of our own hides (attention's), isn't looked into.
"""

from __future__ import annotations

import linecache
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("meta")
_ROOT = Path(__file__).parents[2]
_aten = torch.ops.aten
_TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_INDEXING = {_aten.index, _aten.index_put, _aten.index_put_, _aten._unsafe_index, _aten._index_put_impl_}
_COPIES = {_aten._to_copy, _aten.copy_, _aten.copy}
_CHECKS = {_aten._linalg_check_errors}
_ANSWERS = {bool: True, int: 1, float: 1.0}


@dataclass(frozen=True)
class Wait:
    """One wait: the operation, the innermost line of this repository, and the functions that led there."""

    operation: str
    file: str
    line: int
    text: str
    inside: tuple[str, ...]  # qualified names, innermost first

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.operation} waits for the device: {self.text}"


class Waits(TorchDispatchMode):
    """Notes every wait; what was to be read comes back as a stand-in (one, or zeros), so that the work can go on.

    Raises AssertionError for a wait whose result has a shape that can't be known.
    """

    def __init__(self, pinned: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.found: list[Wait] = []
        self._pinned = {tensor.untyped_storage()._cdata for tensor in pinned}
        self._kept = list(pinned)
        self._lists = _FromLists(self)

    def __enter__(self) -> Waits:
        self._lists.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._lists.__exit__(*error)

    def note(self, operation: str) -> Wait:
        """Remember a wait here."""
        frames = _frames()
        innermost = frames[0]
        path, line = innermost.f_code.co_filename, innermost.f_lineno
        inside = tuple(frame.f_code.co_qualname for frame in frames)
        name = str(Path(path).relative_to(_ROOT))
        self.found.append(Wait(operation, name, line, linecache.getline(path, line).strip(), inside))
        return self.found[-1]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet, name = func.overloadpacket, func.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        there = [t for t in tensors if t.device == DEVICE]
        if packet in _COPIES:
            return self._copy(func, args, kwargs)
        if not there:
            return func(*args, **kwargs)
        if packet in _INDEXING:
            self._index(name, args[1])
        elif packet == _aten.where and len(there) < len(tensors):
            self.note(f"{name} with a host tensor")  # which it copies
        elif packet in _CHECKS:
            self.note(name)
            return None
        elif _TAGS.intersection(func.tags) and "output_size" not in kwargs:
            wait = self.note(name)
            if torch.Tag.data_dependent_output not in func.tags:
                raise AssertionError(str(wait))
            return _ANSWERS[type(torch.zeros((), dtype=there[0].dtype).item())] if packet != _aten.equal else True
        return func(*args, **kwargs)

    def _copy(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Between host and device, or on either."""
        if func.overloadpacket is _aten._to_copy:
            source, goal = args[0], torch.device(kwargs.get("device") or args[0].device)
        else:
            source, goal = args[1], args[0].device
        waits = not (kwargs.get("non_blocking") or args[2:3] == (True,))
        if source.device == goal:
            return func(*args, **kwargs)
        if source.device == DEVICE:
            if waits:
                self.note("a copy to the host")
            if func.overloadpacket is _aten._to_copy:
                return torch.zeros(source.shape, dtype=kwargs.get("dtype") or source.dtype)
            return args[0]
        if waits:
            self.note("a copy from the host")
        elif source.untyped_storage()._cdata not in self._pinned and _frames()[0].f_code.co_qualname != "send":
            self.note("a copy from host memory that isn't page-locked")
        return func(*args, **kwargs)

    def _index(self, name: str, indices: Any) -> None:
        for index in indices:
            if index is not None and index.device != DEVICE:
                self.note(f"{name} by an index on the host")
            elif index is not None and index.dtype in (torch.bool, torch.uint8):
                raise AssertionError(str(self.note(f"{name} by a mask")))


class _FromLists(TorchFunctionMode):
    """Sees tensors that are made on the device from numbers of the host, which no dispatch shows."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func in (torch.tensor, torch.as_tensor, torch.asarray)
        where = (kwargs or {}).get("device")
        if made and where is not None and torch.device(where) == DEVICE and not _is_there(args[0]):
            self.waits.note(f"torch.{func.__name__} from the host")
        return func(*args, **(kwargs or {}))


def _is_there(data: Any) -> bool:
    return isinstance(data, Tensor) and data.device == DEVICE


def _frames() -> list[FrameType]:
    """Frames of this repository, innermost first, without those of this file."""
    frame: FrameType | None = sys._getframe(1)
    frames = []
    while frame is not None:
        path = frame.f_code.co_filename
        if path != __file__ and path.startswith(str(_ROOT)) and "/.venv/" not in path:
            frames.append(frame)
        frame = frame.f_back
    return frames
