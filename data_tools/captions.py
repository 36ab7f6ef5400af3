"""Captions of a folder of media, from `NAME.txt` beside each file or from a table (CSV, TSV, JSONL) with a row each."""

from __future__ import annotations

import csv
import io
import json
import posixpath
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sora_train.core.cli import InputError

FILE_COLUMNS = ("file", "path", "video", "filename")
TEXT_COLUMNS = ("caption", "text", "captions")
MAX_FIELD = 1 << 20  # characters of one table cell


class Refused(Exception):
    """Something that can't be used: a `kind` for counting, and a `detail` for the reader."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind, self.detail = kind, detail


@dataclass(frozen=True)
class Row:
    """One row of a caption table: its number (the first line is 1), its file as written, and its fields."""

    number: int
    file: str
    caption: Any  # text as found, or a map of name to text
    fields: dict[str, Any]  # whatever else the row holds


def read_sidecar(path: Path) -> str | None:
    """The caption in `NAME.txt` beside a media file, None if there is none. Raises Refused if it can't be used."""
    try:
        data = path.with_suffix(".txt").read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Refused("unreadable", f"caption: {error.strerror}") from error
    return caption_text(data)


def caption_text(data: bytes) -> str:
    """Decode and trim one caption. Raises Refused if it isn't UTF-8 (with the position of the byte) or is empty."""
    try:
        text = data.decode("utf-8").removeprefix("\ufeff").strip()
    except UnicodeDecodeError as error:
        raise Refused("caption not UTF-8", f"byte 0x{data[error.start]:02x} at position {error.start}") from error
    if not text:
        raise Refused("empty caption")
    return text


def row_json(row: Row) -> dict[str, Any]:
    """What stands in a sample's json for a table row: `caption` or `captions`, then the other fields.

    Raises Refused if a caption is empty or not UTF-8.
    """
    if isinstance(row.caption, dict) and row.caption:
        return {"captions": {str(k): _checked(v) for k, v in row.caption.items()}} | row.fields
    return {"caption": _checked(row.caption)} | row.fields


def read_table(path: Path) -> tuple[list[Row], list[tuple[str, Refused]]]:
    """The rows of a caption table, and what is wrong with those that can't be used, each with a name for it.

    Raises InputError if the file can't be read, is of another kind, or lacks the columns for file and caption.
    """
    try:
        text = path.read_bytes().decode("utf-8", "surrogateescape").removeprefix("\ufeff")
    except OSError as error:
        raise InputError(f"cannot read captions={path}: {error.strerror}") from error
    kind = path.suffix.lower()
    if kind in (".csv", ".tsv"):
        return _split(path, _csv_records(path, text))
    if kind in (".jsonl", ".ndjson"):
        return _split(path, _json_records(text))
    raise InputError(f"captions={path} must be a .csv, .tsv or .jsonl file")


def match(rows: Iterable[Row], files: list[str], folder: Path) -> tuple[dict[str, Row], list[tuple[str, Refused]]]:
    """Which row belongs to which file (relative to `folder`), and the rows that belong to none.

    A row names a file by its relative or absolute path, or by its bare name if only one file has that name.
    """
    by_path = {unicodedata.normalize("NFC", file): file for file in files}
    by_name: dict[str, list[str]] = {}
    for path, file in by_path.items():
        by_name.setdefault(posixpath.basename(path), []).append(file)
    found: dict[str, Row] = {}
    refused: list[tuple[str, Refused]] = []
    for row in rows:
        name = _relative(row.file, folder)
        candidates = [by_path[name]] if name in by_path else by_name.get(name, [])
        if not candidates:
            refused.append((row.file, Refused("caption without file", f"row {row.number}: there is no such file")))
        elif len(candidates) > 1:
            detail = f"row {row.number}: {len(candidates)} files have this name, such as {candidates[0]}"
            refused.append((row.file, Refused("caption without file", detail)))
        elif candidates[0] in found:
            detail = f"row {row.number}: row {found[candidates[0]].number} is for the same file and is used"
            refused.append((row.file, Refused("duplicate", detail)))
        else:
            found[candidates[0]] = row
    return found, refused


def _checked(caption: Any) -> str:
    if caption is None:
        raise Refused("empty caption")
    if not isinstance(caption, str):
        raise Refused("bad caption row", f"the caption is a {type(caption).__name__}, not text")
    try:
        return caption_text(caption.encode("utf-8", "surrogateescape"))
    except UnicodeEncodeError as error:
        raise Refused("caption not UTF-8", f"half a surrogate pair at character {error.start}") from error


def _relative(file: str, folder: Path) -> str:
    """A row's file name as a normalised path relative to the folder."""
    name = posixpath.normpath(file.strip().replace("\\", "/"))
    for root in (folder, folder.resolve()):
        name = name.removeprefix(f"{root}/") if posixpath.isabs(name) else name
    return unicodedata.normalize("NFC", name)


Records = list[tuple[int, dict[str, Any] | str]]  # row number, and the row, or what is wrong with it


def _csv_records(path: Path, text: str) -> Records:
    csv.field_size_limit(MAX_FIELD)
    first_line = text.partition("\n")[0].strip()
    for delimiter in (",", "\t", ";"):
        header = next(csv.reader([first_line], delimiter=delimiter), [])
        if _column(header, FILE_COLUMNS) and _column(header, TEXT_COLUMNS):
            break
    else:
        shown = first_line[:80].encode("ascii", "backslashreplace").decode()
        raise InputError(
            f"captions={path}: the first line must name a column for the file ({'/'.join(FILE_COLUMNS)}) and one for"
            f" the caption ({'/'.join(TEXT_COLUMNS[:2])}); it is {shown!r}"
        )
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, restkey="")
        return [(number, {k: v for k, v in row.items() if k}) for number, row in enumerate(reader, 2)]
    except csv.Error as error:
        raise InputError(f"captions={path}: line {reader.line_num}: {error}") from error


def _json_records(text: str) -> Records:
    records: Records = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            records.append((number, f"row {number} is not JSON: {error}"))
            continue
        records.append((number, value if isinstance(value, dict) else f"row {number} is not a JSON object"))
    return records


def _split(path: Path, records: Records) -> tuple[list[Row], list[tuple[str, Refused]]]:
    rows: list[Row] = []
    refused: list[tuple[str, Refused]] = []
    for number, record in records:
        if isinstance(record, str):
            refused.append((path.name, Refused("bad caption row", record)))
            continue
        file, text = _column(record, FILE_COLUMNS), _column(record, TEXT_COLUMNS)
        name = record.get(file or "")
        if not isinstance(name, str) or not name.strip():
            refused.append((path.name, Refused("bad caption row", f"row {number} names no file")))
            continue
        taken = {file, text, "caption", "captions"}  # a second caption column would hide the one that was chosen
        fields = {key: value for key, value in record.items() if key not in taken}
        rows.append(Row(number, name, record.get(text or ""), fields))
    if not rows:
        raise InputError(f"captions={path} has no row with {'/'.join(FILE_COLUMNS)} and {'/'.join(TEXT_COLUMNS[:2])}")
    return rows, refused


def _column(names: Iterable[str], wanted: tuple[str, ...]) -> str | None:
    """The first of the wanted columns that there is, whatever its case."""
    found = {name.strip().lower(): name for name in reversed(list(names))}
    return next((found[name] for name in wanted if name in found), None)
