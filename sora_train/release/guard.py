"""Guards of prompts and frames: a word list, and models behind an endpoint or in a local folder.

With `guard_fails: closed` a guard that doesn't answer counts as a refusal, so that an outage lets nothing through.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from sora_train.core.cli import InputError
from sora_train.release.folder import ReleaseFolder
from sora_train.release.verdict import Unavailable, Verdict
from sora_train.release.words import WordList, read_words

UNREACHABLE = "guard unavailable"  # category of a refusal because a guard doesn't answer
_SHOWN = 8  # frames of a video, or of a piece of one, that are checked


class Checker(Protocol):
    """One guard. Its methods raise Unavailable."""

    name: str
    sees: bool  # whether it checks frames

    def text(self, text: str) -> Verdict | None:
        """Check a text. Returns a finding, or None."""

    def frames(self, frames_THWC: np.ndarray) -> Verdict | None:
        """Check frames, uint8. Returns a finding, or None."""


@dataclass
class Words:
    """The word list as a guard."""

    words: WordList
    name: str = "words"
    sees: bool = False

    def text(self, text: str) -> Verdict | None:
        """Return a finding if the text contains a phrase of the list, else None."""
        category = self.words.category(text)
        return None if category is None else Verdict(category, self.name)

    def frames(self, frames_THWC: np.ndarray) -> Verdict | None:
        """Return None: a word list can't check frames."""
        return None


@dataclass(frozen=True)
class Guard:
    """Several guards, called in order; the first finding counts."""

    checkers: Sequence[Checker]
    closed: bool  # whether a guard that doesn't answer counts as a refusal

    @property
    def sees(self) -> bool:
        """Tell whether any of them checks frames."""
        return any(checker.sees for checker in self.checkers)

    def texts(self, texts: Sequence[str]) -> Verdict | None:
        """Check each text, and all of them joined by spaces. Returns the first finding, or None."""
        every = list(dict.fromkeys([*texts, " ".join(texts)]))
        for checker in self.checkers:
            for text in every:
                try:
                    verdict = checker.text(text)
                except Unavailable as error:
                    verdict = self._down(checker, error)
                if verdict is not None:
                    return verdict
        return None

    def frames(self, frames_THWC: np.ndarray) -> Verdict | None:
        """Check up to `_SHOWN` evenly spaced frames of a video. Returns the first finding, or None."""
        places = np.unique(np.linspace(0, len(frames_THWC) - 1, _SHOWN).round().astype(int))
        for checker in self.checkers:
            if not checker.sees:
                continue
            try:
                verdict = checker.frames(frames_THWC[places])
            except Unavailable as error:
                verdict = self._down(checker, error)
            if verdict is not None:
                return verdict
        return None

    def _down(self, checker: Checker, error: Unavailable) -> Verdict | None:
        print(f"warning: guard {checker.name} doesn't answer: {error}", file=sys.stderr, flush=True)
        return Verdict(UNREACHABLE, checker.name) if self.closed else None


def guard_of(folder: ReleaseFolder) -> Guard | None:
    """Load the guards that the settings name; None if they name none. Raises InputError for a missing file or model."""
    s = folder.settings
    checkers: list[Checker] = []
    if s.guard_words:
        checkers.append(Words(read_words(folder.text(s.guard_words), str(folder.file(s.guard_words)))))
    if s.guard_text_folder or s.guard_image_folder:
        from sora_train.release.local_guard import LocalGuard  # transformers takes seconds to import

        for name in ("guard_text_folder", "guard_image_folder"):
            path = getattr(s, name)
            if path and not folder.file(path).is_dir():
                raise InputError(f"{name}={path} in {folder.path}: there is no such folder")
        safe = {one.strip().lower() for one in s.guard_safe_classes.split(",")}
        text, image = (folder.file(f) if f else None for f in (s.guard_text_folder, s.guard_image_folder))
        checkers.append(LocalGuard(text, image, s.guard_threshold, safe))
    if s.guard_endpoint:
        from sora_train.release.endpoint import Endpoint

        checkers.append(Endpoint(s.guard_endpoint, s.guard_api, s.guard_model, s.guard_images, s.guard_seconds))
    return Guard(checkers, s.guard_fails == "closed") if checkers else None
