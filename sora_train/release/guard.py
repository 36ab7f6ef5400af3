"""Guards of prompts and frames: a word list, and models behind an endpoint or in a local folder.

A guard that doesn't answer counts as a refusal (`guard_fails: closed`), so that what is down lets nothing through.
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

UNREACHABLE = "guard unavailable"  # category of a refusal because of a guard that doesn't answer
_SHOWN = 8  # frames of a piece that a guard is shown


class Checker(Protocol):
    """One guard. Its methods raise Unavailable."""

    name: str
    sees: bool  # it looks at frames

    def text(self, text: str) -> Verdict | None:
        """A finding against a text."""

    def frames(self, frames_THWC: np.ndarray) -> Verdict | None:
        """A finding against frames."""


@dataclass
class Words:
    """The word list as a guard."""

    words: WordList
    name: str = "words"
    sees: bool = False

    def text(self, text: str) -> Verdict | None:
        """A finding where the text holds a phrase of the list."""
        category = self.words.category(text)
        return None if category is None else Verdict(category, self.name)

    def frames(self, frames_THWC: np.ndarray) -> Verdict | None:
        """Nothing: it sees no frames."""
        return None


@dataclass(frozen=True)
class Guard:
    """Several guards, asked one after the other; the first finding counts."""

    checkers: Sequence[Checker]
    closed: bool  # a guard that doesn't answer refuses

    @property
    def sees(self) -> bool:
        """Tell whether any of them looks at frames."""
        return any(checker.sees for checker in self.checkers)

    def texts(self, texts: Sequence[str]) -> Verdict | None:
        """A finding against any of the texts, or against all of them read as one."""
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
        """A finding against evenly spaced frames of a video."""
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
    """The guards that the settings name. Raises InputError for what isn't there."""
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
