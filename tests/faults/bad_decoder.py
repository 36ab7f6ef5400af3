"""A decode child whose back ends do what the end of a file says: spin holding the lock, crash, eat memory.

Run by the pool in place of `sora_train.data.read.decode_child`.
"""

from __future__ import annotations

import ctypes
import re
from typing import Any

import numpy as np

from sora_train.data.read import back_ends
from sora_train.data.read import decode_child as child

SPIN, CRASH, EAT = b"!spin", b"!crash", b"!eat"
BOTH = b"!both"  # before the word: PyAV does it too


def _behave(data: bytes) -> None:
    if data.endswith(SPIN):
        re.match(r"(a+)+$", "a" * 60 + "b")  # for ever, and never lets the lock go
    if data.endswith(CRASH):
        ctypes.string_at(0)
    if data.endswith(EAT):
        hoard = []
        while True:
            hoard.append(np.empty(1 << 24))  # the limit is on addresses: what is never written takes no time


def _wrapped(name: str, real: Any) -> Any:
    def run(data: bytes, *rest: Any) -> np.ndarray:
        if name == "decord" or BOTH in data[-16:]:
            _behave(data)
        return real(data, *rest)

    return run


if __name__ == "__main__":
    for back_end, real in list(back_ends.BACK_ENDS.items()):
        back_ends.BACK_ENDS[back_end] = _wrapped(back_end, real)
    child.main()
