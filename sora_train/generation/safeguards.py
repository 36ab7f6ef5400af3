"""Interface of the safeguards between a prompt and a file: check of prompt and frames, mark, signature.

`release/safeguards.py` implements it. `NO_SAFEGUARDS`, for users without a release folder, does nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sora_train.core.cli import InputError
from sora_train.generation.video import Video

Write = Callable[[Path, Video], None]  # writes a video to a file


class Refused(InputError):
    """A guard refused a prompt, a given file or a video."""

    def __init__(self, message: str, category: str) -> None:
        super().__init__(message)
        self.category = category


class Safeguards:
    """No checks, no mark, no signature."""

    def check_format(self, format: str) -> None:
        """Raise InputError for a file format that can't contain the safeguards' manifest."""

    def check_prompt(self, texts: Sequence[str], given: Sequence[np.ndarray]) -> None:
        """Check captions and given pictures, each `(T, H, W, 3)` uint8. Raises Refused."""

    def prompt_hash(self, text: str) -> str:
        """A hash of a prompt, for records that must not contain prompts; empty without a key."""
        return ""

    def about(self, about: Mapping[str, Any]) -> dict[str, Any]:
        """Return entries for the JSON of a sample that describe the safeguards applied to it."""
        return {}

    def write(self, path: Path, video: Video, write: Write, about: Mapping[str, Any]) -> None:
        """Write a video to `path` by `write`. The file appears only when it is checked, marked and signed.

        Raises Refused.
        """
        write(path, video)

    def sign(self, path: Path, about: Mapping[str, Any]) -> None:
        """Sign an image file that belongs to a video, replacing the file."""


NO_SAFEGUARDS = Safeguards()
