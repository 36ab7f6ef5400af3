"""Caches a result that several metrics compute from the same video."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import numpy as np

Result = TypeVar("Result")


def remembered(function: Callable[[np.ndarray], Result]) -> Callable[[np.ndarray], Result]:
    """Cache the function's result for its last argument in each thread, until that array is deleted.

    Arrays are compared by identity, so neither an argument nor a result may be changed in place.
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
