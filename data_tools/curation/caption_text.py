"""Parses and checks the captions in the answer of a vision-language model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from sora_train.core.model_text import BadText, checked

LENGTHS = ("short", "medium", "long")
FIELDS = ("subject", "setting", "camera", "style")
PROMPT = (
    "These are frames of one video clip, in order. Describe the clip as it would be described to someone who makes it: "
    "who or what is there, what happens, where, how the camera moves, the light and the style. State what is seen, "
    "without guesses, without naming real people, and without words such as 'the video shows'. Answer with one JSON "
    'object: {"short": "one sentence", "medium": "two or three sentences", "long": "a paragraph of 80 to 150 words", '
    '"subject": "...", "setting": "...", "camera": "...", "style": "..."}'
)


def read_answer(text: str) -> dict[str, dict[str, str]]:
    """Parse an answer: `captions` by length, and `about` with its other fields. Plain text is one long caption.

    Raises BadText for invalid JSON, or for captions that don't pass the checks.
    """
    if "{" not in text:
        return {"captions": {"long": checked("long", text)}, "about": {}}
    value = _json(text)
    captions = {name: checked(name, value[name]) for name in LENGTHS if isinstance(value.get(name), str)}
    if not captions:
        raise BadText("no caption", f"the answer has {sorted(value)[:6]}, none of {', '.join(LENGTHS)}")
    about = {name: value[name].strip() for name in FIELDS if isinstance(value.get(name), str) and value[name].strip()}
    return {"captions": captions, "about": about}


def _json(text: str) -> Mapping[str, Any]:
    """Parse the JSON object in an answer, which may be in a code block or within text."""
    inner = text[text.index("{") : text.rindex("}") + 1] if "}" in text else text
    try:
        value = json.loads(inner)
    except (ValueError, RecursionError) as error:
        raise BadText("no json", f"{error}: {text[:80]!r}") from error
    if not isinstance(value, dict):
        raise BadText("no json", f"{type(value).__name__}: {text[:80]!r}")
    return value
