"""Captions as a model writes them: read from its answer, and checked before they are believed."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

LENGTHS = ("short", "medium", "long")
FIELDS = ("subject", "setting", "camera", "style")
PROMPT = (
    "These are frames of one video clip, in order. Describe the clip as it would be described to someone who makes it: "
    "who or what is there, what happens, where, how the camera moves, the light and the style. State what is seen, "
    "without guesses, without naming real people, and without words such as 'the video shows'. Answer with one JSON "
    'object: {"short": "one sentence", "medium": "two or three sentences", "long": "a paragraph of 80 to 150 words", '
    '"subject": "...", "setting": "...", "camera": "...", "style": "..."}'
)
_FEWEST = {"short": 3}  # words of a caption by its name; of the others:
_FEW, _MANY = 5, 400
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
_RUN = 5  # words in a row that may come three times at most
_VARIETY = 0.25  # of a longer caption's words that differ


class BadCaption(Exception):
    """An answer that is no caption: one word or two for counting, and a detail."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind, self.detail = kind, detail


def read_answer(text: str) -> dict[str, dict[str, str]]:
    """The captions by their names and the other fields of an answer; of plain text, one caption.

    Raises BadCaption for an answer that is neither, or whose captions don't pass.
    """
    if "{" not in text:
        return {"captions": {"long": checked("long", text)}, "about": {}}
    value = _json(text)
    captions = {name: checked(name, value[name]) for name in LENGTHS if isinstance(value.get(name), str)}
    if not captions:
        raise BadCaption("no caption", f"the answer has {sorted(value)[:6]}, none of {', '.join(LENGTHS)}")
    about = {name: value[name].strip() for name in FIELDS if isinstance(value.get(name), str) and value[name].strip()}
    return {"captions": captions, "about": about}


def checked(name: str, text: str) -> str:
    """A caption without an opener; raises BadCaption for a refusal, a loop, or one that is too short or too long."""
    plain = " ".join(text.split())
    if _REFUSAL.search(plain):
        raise BadCaption("refusal", plain[:120])
    without = _OPENER.sub("", plain)
    plain = without[:1].upper() + without[1:]
    words = re.findall(r"\w+", plain.lower())
    if not _FEWEST.get(name, _FEW) <= len(words) <= _MANY:
        raise BadCaption("length", f"{len(words)} words: {plain[:80]}")
    runs = Counter(tuple(words[at : at + _RUN]) for at in range(len(words) - _RUN + 1))
    if max(runs.values(), default=0) > 3 or (len(words) > 40 and len(set(words)) < _VARIETY * len(words)):
        raise BadCaption("repetition", plain[:120])
    return plain


def _json(text: str) -> Mapping[str, Any]:
    """The JSON object in an answer, which may stand in a block of code or between words."""
    inner = text[text.index("{") : text.rindex("}") + 1] if "}" in text else text
    try:
        value = json.loads(inner)
    except (ValueError, RecursionError) as error:
        raise BadCaption("no json", f"{error}: {text[:80]!r}") from error
    if not isinstance(value, dict):
        raise BadCaption("no json", f"{type(value).__name__}: {text[:80]!r}")
    return value
