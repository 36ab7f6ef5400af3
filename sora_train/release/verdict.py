"""Findings of guards."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Verdict:
    """A finding against a text or a video."""

    category: str
    by: str  # the guard that found it
    score: float = 1.0


class Unavailable(Exception):
    """A guard gave no answer."""
