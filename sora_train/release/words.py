"""Word list: phrases compared after folding case, width, accents, look-alikes, and hidden and spaced letters.

It is a minimum to be used with other guards, since it compares words and not meaning. Each line is `category: phrase`;
lines that start with # are comments.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

from sora_train.core.cli import InputError
from sora_train.release.lookalikes import CAPITALS, LETTERS, PICTURED

_INSIDE = re.compile(r"(?<=[^\W_])(?:[^\w\s]|_)+(?=[^\W_])")  # marks between letters of a word
_HIDDEN = "\u115f\u1160\u17b4\u17b5"  # invisible letters


@dataclass(frozen=True)
class WordList:
    """Phrases by category, folded."""

    phrases: dict[tuple[str, ...], str]  # words of a phrase -> category

    def category(self, text: str) -> str | None:
        """The category of the first phrase that a text contains, or None."""
        longest = max(map(len, self.phrases), default=0)
        for words in readings(text):
            for start in range(len(words)):
                for length in range(1, min(longest, len(words) - start) + 1):
                    found = self.phrases.get(tuple(words[start : start + length]))
                    if found is not None:
                        return found
        return None


def read_words(text: str, name: str) -> WordList:
    """Parse the text of the file `name` into a list. Raises InputError that names the first invalid line."""
    phrases: dict[tuple[str, ...], str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        category, colon, phrase = line.partition(":")
        words = tuple(_plain_words(fold(phrase)))
        if not colon or not category.strip() or not words:
            raise InputError(f"{name}: line {number} must be 'category: word or phrase'")
        phrases[words] = category.strip()
        phrases[(*words[:-1], words[-1] + "s")] = category.strip()
    return WordList(phrases)


def fold(text: str) -> str:
    """Normalise a text to lower-case Latin letters.

    Accents and invisible characters are removed, look-alikes replaced, and repeated characters collapsed.
    """
    plain = _shown(text).translate(CAPITALS).casefold().translate(LETTERS)
    plain = unicodedata.normalize("NFKD", plain)
    return "".join(one for one, _ in groupby(plain))


def _shown(text: str) -> str:
    """Decompose a text by Unicode's NFKD, and remove accents and invisible characters."""
    hidden = ("Mn", "Me", "Cf", "Cc", "Co", "Cn")
    plain = unicodedata.normalize("NFKD", text)
    return "".join(c for c in plain if c in "\n\t" or not (unicodedata.category(c) in hidden or c in _HIDDEN))


def readings(text: str) -> list[list[str]]:
    """Three readings of a text as words: split at every mark, joined across marks, and with single letters joined."""
    folded = fold(text)
    joined = _INSIDE.sub("", _shown(text).translate(PICTURED))  # before `fold` makes letters of ! and |
    spaced = _joined_letters(_plain_words(folded))
    return [_plain_words(folded), _plain_words(fold(joined)), [fold(word) for word in spaced]]


def _plain_words(folded: str) -> list[str]:
    return re.findall(r"[^\W_]+", folded)


def _joined_letters(words: Iterable[str]) -> list[str]:
    """Join each run of single letters into one word."""
    found: list[str] = []
    for single, run in groupby(words, key=lambda word: len(word) == 1):
        letters = list(run)
        found += ["".join(letters)] if single else letters
    return found
