"""Deadlines of single requests to decode processes: those that must be answered have time on a busy machine too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Deadlines = Callable[[Callable[[dict[str, Any]], float]], None]  # takes the seconds that a request is given
