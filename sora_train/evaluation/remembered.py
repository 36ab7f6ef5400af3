"""Remembers what several metrics work out of the same video."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import numpy as np

Result = TypeVar("Result")


def remembered(function: Callable[[np.ndarray], Result]) -> Callable[[np.ndarray], Result]:
    """Keep the function's result for the array that it was last given in this thread, as long as that is there.

    An array is known by being the same object: nobody may change one that was given, nor a result.
    """
    threads = threading.local()

    @wraps(function)
    def result(array: np.ndarray) -> Result:
        kept: list[Any] = threads.__dict__.setdefault("kept", [])
        if not kept or kept[0]() is not array:
            found = function(array)
            kept[:] = [weakref.ref(array, lambda gone: kept.clear() if kept and kept[0] is gone else None), found]
        last: Result = kept[1]
        return last

    return result
