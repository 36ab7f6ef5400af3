"""Reads captions for a folder of media from a table, or from sidecars: text or JSON files beside the media files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from data_tools.columns import Columns
from data_tools.cut import Part
from data_tools.parts import listed, parts_of, ranges_of
from data_tools.tables import Record, decoded, read_records
from sora_train.core.cli import InputError
from sora_train.data.index.captions import caption_text, has_captions, is_missing, named_captions, with_captions
from sora_train.data.read.decode import DecodeError

_TOLD = ("text", "prompt", "cap")  # fields of a JSON sidecar used as the caption if there is no other
SIDECARS = ("txt", "caption", "json")  # extensions of sidecars, in order of preference
TABLES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # names in Hugging Face's layout of a folder
_KINDS = {"no_caption": "empty caption", "caption_not_utf8": "caption not UTF-8", "caption_type": "caption not text"}


class Refused(Exception):
    """A file or row can't be used: `kind` is a category for counting, `detail` explains it to the reader."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind, self.detail = kind, detail

    @staticmethod
    def of(error: DecodeError, where: str = "") -> Refused:
        """Convert the DecodeError of a caption; `where` precedes its detail."""
        kind = _KINDS.get(error.cause, error.cause.replace("_", " "))
        return Refused(kind, where + ("" if error.detail == "the caption is empty" else error.detail))


@dataclass(frozen=True)
class Row:
    """One row of a caption table: its line number (from 1), its file as written there, and its other values."""

    number: int
    file: str
    captions: dict[str, str] | Refused  # by name, or why they can't be used
    fields: dict[str, Any]  # values of all other columns
    part: Part | None = None  # part of the file that the row refers to; None: all of it


Bad = list[tuple[str, Refused]]  # unusable entries: name and reason


@dataclass(frozen=True)
class CaptionTable:
    """The usable rows of a table, the others with reasons, and a line that tells the role of each column."""

    rows: list[Row]
    bad: Bad
    said: str


def read_table(path: Path, columns: Columns, encoding: str | None = None) -> CaptionTable:
    """Read a caption table.

    Raises InputError if the file can't be read, is of another kind, or lacks the columns for file and caption.
    """
    table = read_records(path, columns, encoding)
    rows: list[Row] = []
    bad: Bad = []
    for record in table.records:
        try:
            rows += _rows(path, record, columns)
        except Refused as reason:
            bad.append((path.name, reason))
    if not rows:
        first = f"; the first: {bad[0][1].detail}" if bad else ""
        raise InputError(
            f"captions={path} has no row with a file and a caption; its columns are {table.columns}{first}"
        )
    chosen = columns.chosen(table.columns)
    taken = {name for names in chosen.values() for name in names}
    rest = [name for name in table.columns if name not in columns.special(table.columns)]
    dropped = [name for name in table.columns if name not in taken and name not in rest]
    said = ", ".join(f"{what} from {' and '.join(map(repr, names))}" for what, names in chosen.items())
    kept = f"; kept as fields: {', '.join(rest)}" if rest else ""
    kept += f"; left out: {', '.join(dropped)}" if dropped else ""
    kept += f"; {table.unnamed} without a name left out" if table.unnamed else ""
    return CaptionTable(rows, bad, f"captions={path}: {len(rows)} rows, {said}{kept}")


class Names:
    """Case-insensitive lookup of file names in one folder."""

    def __init__(self, names: Iterable[str]) -> None:
        self._exact = set(names)
        self._lower = {name.lower(): name for name in sorted(self._exact, reverse=True)}

    def find(self, name: str) -> str | None:
        """The file of that name, else one whose name differs only in case, else None."""
        return name if name in self._exact else self._lower.get(name.lower())


def sidecar(path: Path, names: Names, encoding: str | None = None) -> dict[str, Any] | None:
    """Read the sidecars of a media file: captions and fields as in a sample's JSON; None if there is no caption.

    Texts are `NAME.mp4.txt` or `NAME.txt` (or `.caption`). A `NAME.json` may contain `caption`, `captions`, or only
    fields. Raises Refused for an invalid sidecar.

    Args:
        path: The media file.
        names: Names of the files in its folder.
        encoding: That of the texts; None: detected.
    """
    texts: list[tuple[str, bytes]] = []
    fields: dict[str, Any] = {}
    for found in sidecars_of(path.name, names):
        data = _bytes(path.with_name(found))
        if found.lower().endswith(".json"):
            fields = fields or _fields(data, found)
        else:
            texts.append((found, data))
    try:
        if has_captions(fields):
            value = fields.get("captions") if has_captions({"captions": fields.get("captions")}) else fields["caption"]
            captions = named_captions(value)
        elif texts:
            captions = {"": caption_text(_decoded(texts[0][1], encoding))}
        elif told := next((name for name in _TOLD if has_captions({"caption": fields.get(name)})), None):
            captions = named_captions(fields.pop(told))
        else:
            return None
    except DecodeError as error:
        raise Refused.of(error) from error
    return with_captions(captions, {k: v for k, v in fields.items() if k not in ("caption", "captions")})


def sidecars_of(name: str, names: Names) -> list[str]:
    """Names of a file's sidecars, in order of preference: first those of its name with extension (`NAME.mp4.txt`)."""
    stem = PurePath(name).stem
    wanted = (f"{base}.{extension}" for base in (name, stem) for extension in SIDECARS)
    return [found for one in wanted if (found := names.find(one)) is not None]


def _rows(path: Path, record: Record, columns: Columns) -> list[Row]:
    """Rows of a record: one, or one for each part if the record has captions for several parts of the file.

    Raises Refused for a record that isn't a row or names no file.
    """
    number, values = record
    if isinstance(values, str):
        raise Refused("bad caption row", values)
    found = columns.of(values)
    name = values.get(found["file"][0]) if "file" in found else None
    if not isinstance(name, str) or not name.strip():
        raise Refused("bad caption row", f"row {number} names no file")
    ranges, taken = ranges_of(values)
    special = columns.special(values) | taken
    fields = {key: None if is_missing(value) else value for key, value in values.items() if key not in special}
    texts = {column: listed(values.get(column)) for column in found.get("caption", ())}
    value = next(iter(texts.values()), None) if len(texts) == 1 else texts
    try:
        _check_utf8(values, found.get("caption", ()))
        parts = parts_of(values, found, ranges)
        if len(parts) < 2:
            return [Row(number, name, _named(value), fields, *parts)]
        if not isinstance(value, list) or len(value) != len(parts):
            count = len(value) if isinstance(value, list) else 1
            raise ValueError(f"it names {len(parts)} parts of its file and has {count} captions")
        return [Row(number, name, _named(text), fields, part) for text, part in zip(value, parts, strict=True)]
    except Refused as reason:
        return [Row(number, name, reason, fields)]
    except ValueError as error:
        return [Row(number, name, Refused("bad caption row", f"row {number}: {error}"), fields)]


def _named(value: Any) -> dict[str, str] | Refused:
    try:
        return named_captions(value)
    except DecodeError as error:
        return Refused.of(error)


def _check_utf8(values: Mapping[str, Any], captions: tuple[str, ...]) -> None:
    """Raise Refused for lone surrogates, which stand for bytes that are invalid in the table's encoding."""
    for column in (*captions, *values):
        value = values.get(column)
        text = value if isinstance(value, str) else ""
        at = next((place for place, character in enumerate(text) if "\udc80" <= character <= "\udcff"), None)
        if at is not None:
            where = f"byte 0x{ord(text[at]) - 0xDC00:02x} at position {at}"
            if column in captions:
                raise Refused("caption not UTF-8", f"{where}; encoding=... says what the table is")
            raise Refused("row not UTF-8", f"{where} of column {column!r}; encoding=... says what the table is")


def _bytes(path: Path) -> bytes:
    if path.exists() and not path.is_file():
        raise Refused("unreadable", f"caption: {path.name} is not a file")
    try:
        return path.read_bytes()
    except OSError as error:
        raise Refused("unreadable", f"caption: {error.strerror}") from error


def _decoded(data: bytes, encoding: str | None) -> str:
    try:
        text = decoded(data, encoding)
    except UnicodeDecodeError as error:
        raise Refused("caption not UTF-8", f"byte 0x{data[error.start]:02x} at position {error.start}") from error
    _check_utf8({"caption": text}, ("caption",))
    return text


def _fields(data: bytes, name: str) -> dict[str, Any]:
    try:
        fields = json.loads(decoded(data))
    except (ValueError, RecursionError) as error:
        raise Refused("bad caption", f"{name} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise Refused("bad caption", f"{name} is not a JSON object")
    return {key: None if is_missing(value) else value for key, value in fields.items()}
