"""Check of captions written by a language model: no refusal, no repetition, no opener such as "the video shows"."""

from __future__ import annotations

import re
from collections import Counter

_FEWEST = {"short": 3}  # fewest words of a caption, by its name
_FEW, _MANY = 5, 400  # fewest words of other captions; most words of any
_REFUSAL = re.compile(
    r"\b(i'?m sorry|i am sorry|i can(no|')t|i am unable|i'?m unable|as an ai|language model|cannot (assist|help)"
    r"|no (image|video|frame)s? (was|were|is|are) (provided|given|attached))\b",
    re.I,
)
_OPENER = re.compile(
    r"^(the|this|these|in (the|this)) (short )?(video|clip|footage|image|frame|scene|sequence)s?( clip)?,?\s*"
    r"((shows?|depicts?|captures?|features?|displays?|presents?|begins with|opens with)( us)?|is of|we see)?"
    r"[\s,:]+",
    re.I,
)
_RUN = 5  # length in words of a sequence that may occur three times at most
_VARIETY = 0.25  # smallest share of distinct words in a longer caption


class BadText(Exception):
    """An unusable answer. `kind` is a word or two by which failures are counted, `detail` describes this one."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind, self.detail = kind, detail


def checked(name: str, text: str) -> str:
    """Check a caption and return it without its opener.

    Args:
        name: Name of the kind of caption, e.g. `short`.
        text: Answer of the model.

    Raises:
        BadText: It is a refusal, repeats itself, or is too short or too long.
    """
    plain = " ".join(text.split())
    if _REFUSAL.search(plain):
        raise BadText("refusal", plain[:120])
    without = _OPENER.sub("", plain)
    plain = without[:1].upper() + without[1:]
    words = re.findall(r"\w+", plain.lower())
    if not _FEWEST.get(name, _FEW) <= len(words) <= _MANY:
        raise BadText("length", f"{len(words)} words: {plain[:80]}")
    runs = Counter(tuple(words[at : at + _RUN]) for at in range(len(words) - _RUN + 1))
    if max(runs.values(), default=0) > 3 or (len(words) > 40 and len(set(words)) < _VARIETY * len(words)):
        raise BadText("repetition", plain[:120])
    return plain
