"""Captions and fields of a sample, from its `KEY.txt` and `KEY.json`: the text as it was written, or a refusal.

Nothing but text becomes a caption: null, NaN and marks of a missing value are none; a number, a nested value and text
that can't be encoded are refused. `data_tools.build_shards` reads its tables and sidecars by the same rules.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from sora_train.data.read.decode import DecodeError

CAPTIONS = ("json", "txt")  # members that may hold captions, in order of preference
MAX_CAPTION_BYTES = 1 << 20
CAPTION_FIELDS = ("caption", "captions")
_MISSING = {"nan", "none", "null", "n/a", "<na>", "nat"}  # what tables and programs write where there is nothing
_INVISIBLE = {"Cc", "Cf", "Zs", "Zl", "Zp"}  # categories of Unicode: control, format, separators
_NAME = re.compile(r"[A-Za-z_]\w{0,63}")
_COLUMNS = 256  # that the jsons of one shard may add
_LARGEST_INTEGER = 1 << 1023  # that fits a float64


def caption_text(value: object) -> str:
    """Return one caption, stripped. Raises DecodeError if it is no text, empty, or marks a missing value."""
    if is_missing(value):
        raise DecodeError("no_caption", "the caption is empty")
    if not isinstance(value, str):
        raise DecodeError("caption_type", f"the caption is {_kind(value)}, not text")
    if len(value) > MAX_CAPTION_BYTES:
        raise DecodeError("caption_too_long", f"{len(value)} characters of caption, {MAX_CAPTION_BYTES} are allowed")
    text = value.removeprefix("\ufeff").strip()
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DecodeError("caption_not_utf8", f"half a surrogate pair at character {error.start}") from error
    if "\0" in text:
        raise DecodeError("caption_binary", "the caption has zero bytes in it")
    if all(unicodedata.category(character) in _INVISIBLE for character in text):
        raise DecodeError("no_caption", "the caption is empty")
    if text.lower() in _MISSING:
        raise DecodeError("no_caption", f"the caption is {text!r}, which stands for a missing value")
    return text


def named_captions(value: object) -> dict[str, str]:
    """Return the captions of a value by name: the entries of a map, the items of a list (numbered), or the text itself.

    Text alone has the name "". Raises DecodeError as `caption_text` does, and if there is no caption.
    """
    if isinstance(value, Mapping):
        named = {str(name): one for name, one in value.items()}
    elif isinstance(value, Sequence) and not isinstance(value, str):
        named = {str(number): one for number, one in enumerate(value)}
    else:
        return {"": caption_text(value)}
    captions = {name: caption_text(one) for name, one in named.items() if not is_missing(one)}
    if not captions:
        raise DecodeError("no_caption", "the caption is empty")
    return captions


def is_missing(value: object) -> bool:
    """Tell whether a value is missing: None or NaN."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def has_captions(fields: Mapping[str, Any]) -> bool:
    """Tell whether a sample's json has a field for captions, valid or not."""
    return any(_is_there(fields.get(name)) for name in CAPTION_FIELDS)


def _is_there(value: object) -> bool:
    if isinstance(value, str):
        return bool(value.strip()) and value.strip().lower() not in _MISSING
    if isinstance(value, (list, dict)):
        return any(not is_missing(one) for one in (value.values() if isinstance(value, dict) else value))
    return not is_missing(value)


def parse_captions(data: bytes, extension: str) -> tuple[list[str], dict[str, Any]]:
    """Parse a txt or json member: its captions, and the fields of the json.

    Raises DecodeError if there is no usable caption.
    """
    if extension == "txt":
        return [caption_text(_decoded(data))], {}
    fields = parse_fields(data)
    value = next((fields[name] for name in reversed(CAPTION_FIELDS) if _is_there(fields.get(name))), None)
    captions = named_captions(fields.get("caption") if value is None else value)
    rest = {name: value for name, value in fields.items() if name not in CAPTION_FIELDS}
    return list(captions.values()), with_captions(captions, rest)


def with_captions(captions: Mapping[str, str], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a sample's json: `caption` for one without a name, else `captions`, then the other fields."""
    if set(captions) == {""}:
        return {"caption": captions[""], **fields}
    return {"captions": dict(captions), **fields}


def parse_fields(data: bytes) -> dict[str, Any]:
    """The fields of a json member; raises DecodeError if it isn't a JSON object."""
    try:
        fields = json.loads(_decoded(data))
    except (ValueError, RecursionError) as error:
        raise DecodeError("caption_json", f"the json can't be read: {error}") from error
    if not isinstance(fields, dict):
        raise DecodeError("caption_json", f"the json is {_kind(fields)}, not an object with fields")
    return fields


def columns_of(fields: Sequence[Mapping[str, Any]]) -> tuple[dict[str, pa.Array], dict[str, str]]:
    """Turn the json fields of a shard's samples into columns by name; also the reason for each field without a column.

    A column is numeric (missing: NaN) if all of its values are numbers, else text (missing: empty). Characters of a
    name that can't be written in a filter are replaced by `_`.
    """
    found: dict[str, None] = dict.fromkeys(name for one in fields for name in one if name not in CAPTION_FIELDS)
    columns: dict[str, pa.Array] = {}
    ignored: dict[str, str] = {}
    for name in found:
        values = [one.get(name) for one in fields]
        column = re.sub(r"\W+", "_", name, flags=re.ASCII).strip("_") if not _NAME.fullmatch(name) else name
        if all(is_missing(value) or not _is_plain(value) for value in values):
            if any(not is_missing(value) for value in values):
                ignored[_plain_text(name)] = "lists or maps"
        elif not _NAME.fullmatch(column):
            ignored[_plain_text(name)] = "its name"
        elif column in columns or (column != name and column in found):
            ignored[_plain_text(name)] = f"the name {column} is taken"
        elif len(columns) == _COLUMNS:
            ignored[_plain_text(name)] = f"more than {_COLUMNS} columns"
        else:
            columns[column] = _column(values)
    return columns, ignored


def _column(values: list[Any]) -> pa.Array:
    plain = [value if _is_plain(value) and not is_missing(value) else None for value in values]
    if all(value is None or _is_number(value) for value in plain):
        return pa.array([math.nan if value is None else float(value) for value in plain], pa.float64())
    return pa.array(["" if value is None else _plain_text(str(value)) for value in plain], pa.string())


def _is_number(value: object) -> bool:
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < _LARGEST_INTEGER)


def _is_plain(value: object) -> bool:
    return isinstance(value, (bool, int, float, str))


def _plain_text(text: str) -> str:
    """Replace unpaired surrogates by U+FFFD, so that the text can be encoded as UTF-8."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _decoded(data: bytes) -> str:
    if len(data) > MAX_CAPTION_BYTES:
        raise DecodeError("caption_too_long", f"{len(data)} bytes of caption, {MAX_CAPTION_BYTES} are allowed")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DecodeError("caption_not_utf8", f"byte {error.start} of the caption is not UTF-8") from error


def _kind(value: object) -> str:
    kinds = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "a map", str: "text"}
    return kinds.get(type(value), "null" if value is None else type(value).__name__)
