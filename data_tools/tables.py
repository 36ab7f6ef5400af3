"""Reads caption tables of common formats (CSV, TSV, JSON, JSON lines, Parquet, lines of text) into records.

A row that can't be read becomes a record with the reason; it never shifts or merges neighbouring rows. The roles of
columns are determined in `columns.py`.
"""

from __future__ import annotations

import codecs
import csv
import datetime
import decimal
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from data_tools.columns import Columns
from sora_train.core.cli import InputError
from sora_train.data.read.decode import IMAGES, VIDEOS

KINDS = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet", ".txt")
MAX_FIELD = 1 << 20  # characters of one table cell
_DELIMITERS = (",", "\t", ";", "|")
_BOMS = {  # UTF-32's before UTF-16's, because the former begin with the latter
    codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip
_PROMPTS, _FILES = ("prompts", "prompt", "captions", "labels"), ("videos", "video", "files", "images")
_MEDIA = re.compile(rf"\.({'|'.join(VIDEOS + IMAGES)})\s*$", re.IGNORECASE)
_FORMULA = re.compile(r'="(.*)"', re.DOTALL)  # a spreadsheet's way to keep text from being read as a number
_SEPARATOR = re.compile(r'\s*"?sep=(.)"?\s*', re.IGNORECASE)

Record = tuple[int, Mapping[str, Any] | str]  # row number (the first line is 1), and the row, or what is wrong with it


class Table(NamedTuple):
    """A table's records, and the names of its columns in order of appearance."""

    columns: list[str]
    records: list[Record]
    unnamed: int = 0  # columns without a name, which are left out


def read_records(path: Path, columns: Columns, encoding: str | None = None) -> Table:
    """Read a caption table. Raises InputError if it can't be read, which tells what was found and what is accepted."""
    kind = path.suffix.lower()
    if kind not in KINDS:
        raise InputError(f"captions={path} must be a {', '.join(KINDS[:-1])} or {KINDS[-1]} file, or a folder of texts")
    if kind == ".parquet":
        return _parquet(path)
    text = _text(path, encoding)
    if kind in (".csv", ".tsv"):
        return _csv(path, text, columns)
    if kind == ".txt":
        return _lines(path, text, columns, encoding)
    whole = kind == ".json" or text.lstrip().startswith("[")
    records = _json(path, text, columns) if whole else _json_lines(text)
    names = dict.fromkeys(name for _, record in records if not isinstance(record, str) for name in record)
    return Table(list(names), records)


def decoded(data: bytes, encoding: str | None = None) -> str:
    """Decode text: in the given encoding, that of its byte order mark, UTF-16 (recognised by zero bytes), or UTF-8.

    Invalid bytes become lone surrogates, so that only the cells that contain them are refused. Raises
    UnicodeDecodeError if the text isn't valid in the given or marked encoding.
    """
    marked = next((name for mark, name in _BOMS.items() if data.startswith(mark)), None)
    if name := encoding or marked:
        lenient = codecs.lookup(name).name in ("utf-8", "utf-8-sig")
        return data.decode(name, "surrogateescape" if lenient else "strict").removeprefix("\ufeff")
    zeros = [at for at in range(4) if data[at : at + 1] == b"\0"]
    wide = "utf-16-le" if zeros == [1, 3] else "utf-16-be" if zeros == [0, 2] else None
    if wide and len(data) % 2 == 0:  # the text begins with two ASCII characters
        return data.decode(wide)
    return data.decode("utf-8", "surrogateescape")


def check_encoding(name: str | None) -> None:
    """Raise InputError for an encoding that Python doesn't know."""
    try:
        codecs.lookup(name or "utf-8")
    except LookupError as error:
        raise InputError(
            f"encoding={name} is unknown; write e.g. utf-8, utf-16, cp1252, gb18030 or shift_jis"
        ) from error


def _text(path: Path, encoding: str | None) -> str:
    try:
        return decoded(path.read_bytes(), encoding)
    except OSError as error:
        raise InputError(f"cannot read captions={path}: {error.strerror}") from error
    except UnicodeError as error:
        place = f" at byte {error.start}" if isinstance(error, UnicodeDecodeError) else ""
        raise InputError(
            f"captions={path} is not {encoding or 'what its first bytes say'}{place}; set encoding="
        ) from error


def _csv(path: Path, text: str, columns: Columns) -> Table:
    csv.field_size_limit(MAX_FIELD)
    lines = list(io.StringIO(text, newline=""))
    at = next((number for number, line in enumerate(lines) if line.strip()), len(lines))
    told = _SEPARATOR.fullmatch(lines[at]) if at < len(lines) else None
    at += told is not None
    for delimiter in (told[1],) if told else _DELIMITERS:
        header, taken = _next_row(lines, at, delimiter)
        if not isinstance(header, str) and columns.fit(header):
            break
    else:
        columns.refuse(path, lines[at] if at < len(lines) else "")
    twice = sorted({name for name in header if name and header.count(name) > 1})
    if twice:
        raise InputError(f"captions={path} has {header.count(twice[0])} columns named {twice[0]!r}; rename them")
    records: list[Record] = []
    at += taken
    number = 1
    while at < len(lines):
        if not lines[at].strip():
            at += 1
            continue
        number += 1
        row, taken = _next_row(lines, at, delimiter)
        records.append((number, _record(number, row, header, lines[at + 1 : at + taken], delimiter)))
        at += 1 if isinstance(records[-1][1], str) else taken  # an unclosed quote loses only its own line
    named = [name for name in header if name]
    return Table(named, _typed(records, columns.special(header), delimiter == ";"), len(header) - len(named))


def _next_row(lines: Sequence[str], at: int, delimiter: str) -> tuple[list[str] | str, int]:
    """Parse the row that begins at line `at`. Returns its cells, or what is wrong with it, and its number of lines."""
    rest = (lines[number] for number in range(at, len(lines)))
    reader = csv.reader(rest, delimiter=delimiter, skipinitialspace=True, strict=True)
    try:
        return [_FORMULA.sub(r"\1", cell.strip()) for cell in next(reader)], reader.line_num
    except (csv.Error, StopIteration) as error:
        return f"its quotes don't pair up ({error}); double a quote that is meant, and quote the whole cell", 1


def _record(
    number: int, row: list[str] | str, header: list[str], further: Sequence[str], delimiter: str
) -> dict[str, Any] | str:
    """Map column names to a row's cells, or return what is wrong with it. `further`: its lines after the first."""
    if isinstance(row, str):
        return f"row {number}: {row}"
    if len(row) > len(header) and any(row[len(header) :]):
        shown = {"\t": "tab"}.get(delimiter, delimiter)
        return (
            f"row {number} has {len(row)} cells for {len(header)} columns; a cell that holds a {shown} must be quoted"
        )
    if any(_MEDIA.search(cell) for line in further for cell in line.split(delimiter)):
        return f"row {number}: a quote is opened and not closed on its line, and swallows the next row"
    return {name: cell for name, cell in zip(header, row, strict=False) if name}


def _typed(records: list[Record], special: set[str], with_commas: bool) -> list[Record]:
    """Convert columns that contain only numbers or only truth values; empty cells of these become None.

    With `with_commas` numbers have decimal commas, as in spreadsheets that separate cells by `;`. Columns in `special`
    stay text.
    """
    rows: list[dict[str, Any]] = [dict(record) for _, record in records if not isinstance(record, str)]
    for name in dict.fromkeys(name for row in rows for name in row):
        cells = [row.get(name) or "" for row in rows]
        filled = [cell for cell in cells if not _is_blank(cell)]
        if with_commas and name not in special and all(_WITH_COMMA.fullmatch(cell) for cell in filled):
            cells, filled = ([cell.replace(",", ".") for cell in some] for some in (cells, filled))
        convert = None if name in special else _converter(filled)
        for row, cell in zip(rows, cells, strict=True):
            if name in row and convert:
                row[name] = None if _is_blank(cell) else convert(cell)
    there = iter(rows)
    return [(number, record if isinstance(record, str) else next(there)) for number, record in records]


_INTEGER, _DECIMAL = re.compile(r"[+-]?(0|[1-9]\d{0,15})"), re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?")
_WITH_COMMA = re.compile(r"[+-]?\d+(,\d+)?")
_TRUTH = {"true": True, "false": False}


def _converter(cells: list[str]) -> Any:
    """Choose the function that converts all the cells; None if they are text. A leading zero makes a number text."""
    if not cells:
        return None
    if all(_INTEGER.fullmatch(cell) for cell in cells):
        return int
    if all(cell.lower() in _TRUTH for cell in cells):
        return lambda cell: _TRUTH[cell.lower()]
    numbers = all(_DECIMAL.fullmatch(cell) and not re.match(r"[+-]?0\d|\d{17}", cell) for cell in cells)
    return float if numbers else None


def _is_blank(cell: str) -> bool:
    return cell.strip().lower() in ("", "nan", "null", "none", "na", "n/a", "<na>")


def _lines(path: Path, text: str, columns: Columns, encoding: str | None) -> Table:
    """Read two files with the same number of lines, as CogVideo has them: one of captions, one of file names."""
    stem = path.stem.lower()
    others = _PROMPTS if stem in _FILES else _FILES
    beside = next((found for name in others if (found := path.with_name(f"{name}.txt")).is_file()), None)
    if beside is None:
        if columns.fit(next(csv.reader([text.partition("\n")[0]], delimiter="\t"), [])):
            return _csv(path, text, columns)
        names = " or ".join(f"{name}.txt" for name in others[:2])
        raise InputError(f"captions={path} holds lines of text, and {names} with as many lines isn't beside it")
    mine, theirs = _split(text), _split(_text(beside, encoding))
    captions, files = (theirs, mine) if others is _PROMPTS else (mine, theirs)
    if len(captions) != len(files):
        raise InputError(f"captions={path} has {len(mine)} lines and {beside} {len(theirs)}: one each is wanted")
    pairs = zip(files, captions, strict=True)
    return Table(["file", "caption"], [(n, {"file": f, "caption": c}) for n, (f, c) in enumerate(pairs, 1) if f or c])


def _split(text: str) -> list[str]:
    """Split a text at LF, CRLF and CR, but not at Unicode's other line breaks; empty lines at its end are dropped."""
    return re.sub(r"\r\n?", "\n", text).rstrip("\n").split("\n")


def _json_lines(text: str) -> list[Record]:
    records: list[Record] = []
    for number, line in enumerate(io.StringIO(text, newline=None), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            records.append((number, f"row {number} is not JSON: {error}"))
            continue
        records.append((number, value if isinstance(value, dict) else f"row {number} is not a JSON object"))
    return records


def _json(path: Path, text: str, columns: Columns) -> list[Record]:
    """Parse JSON: a list of objects, an object with one such list, captions or fields by file, columns, or lines.

    Raises InputError for another form.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        if len([line for line in text.splitlines() if line.strip().startswith("{")]) > 1:
            return _json_lines(text)
        raise InputError(f"captions={path} is not JSON: {error}") from error
    if isinstance(value, dict):
        lists = [
            inner for inner in value.values() if isinstance(inner, list) and any(isinstance(i, dict) for i in inner)
        ]
        value = lists[0] if len(lists) == 1 else list(_by_file(value, columns))
    if not isinstance(value, list) or not value:
        raise InputError(f"captions={path} must hold a list of objects with a file and a caption each")
    return [
        (number, entry if isinstance(entry, dict) else f"entry {number} is not an object")
        for number, entry in enumerate(value, 1)
    ]


def _by_file(value: dict[str, Any], columns: Columns) -> Iterator[dict[str, Any]]:
    """Yield rows of an object that maps files to captions or fields, or columns to values by row (as pandas writes)."""
    if columns.fit(value) and all(isinstance(inner, dict) for inner in value.values()):
        for key in next(iter(value.values())):
            yield {name: column.get(key) for name, column in value.items()}
        return
    for file, inner in value.items():
        yield {"file": file, **inner} if isinstance(inner, dict) else {"file": file, "caption": inner}


def _parquet(path: Path) -> Table:
    """Read a Parquet table without binary columns. A struct with a path, as Hugging Face has it, becomes the path."""
    try:
        file = pq.ParquetFile(path)
        names = [
            f.name for f in file.schema_arrow if not pa.types.is_binary(f.type) and not pa.types.is_large_binary(f.type)
        ]
        wanted = [f"{name}.path" if _has_path(file.schema_arrow.field(name).type) else name for name in names]
        rows = file.read(columns=wanted).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"cannot read captions={path}: {str(error).splitlines()[0]}") from error
    records: list[Record] = [(number, {k: _plain(v) for k, v in row.items()}) for number, row in enumerate(rows, 1)]
    return Table(names, records)


def _has_path(kind: pa.DataType) -> bool:
    return pa.types.is_struct(kind) and kind.get_field_index("path") >= 0


def _plain(value: Any) -> Any:
    """Convert a value to JSON types."""
    if isinstance(value, dict):
        return value["path"] if set(value) == {"path"} else {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    if isinstance(value, decimal.Decimal):
        return float(value)
    return str(value) if isinstance(value, (datetime.date, datetime.time, datetime.timedelta, bytes)) else value
