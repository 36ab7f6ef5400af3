"""Files of prompts: a line, a row or an object for each sample."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from pathlib import Path
from typing import Any

from sora_train.core.cli import InputError, nearest

_DELIMITER = re.compile(r"sep=(.)\r?\n", re.IGNORECASE)  # a first line for Excel


def read_rows(path: str, known: list[str]) -> list[dict[str, Any]]:
    """Read a file of prompts; returns for each row its options by key, all of them in `known`.

    `.txt`: a prompt a line; empty lines are ignored. `.csv`, `.tsv`: a column for each option; empty cells, empty rows
    and a first column without a name are ignored. `.jsonl`: an object or a prompt in quotes per line; `.json`: a
    list of them.

    Raises:
        InputError: The file can't be read, has no prompts, or has a faulty row; the message names the row.
    """
    kind = Path(path).suffix.lower()
    if kind not in _READERS:
        raise InputError(f"prompts={path} must be a {', '.join(_READERS)} file")
    try:
        data = Path(path).read_bytes()
        text = data.decode("utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig")
    except OSError as error:
        raise InputError(f"prompts={path} can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"prompts={path} is not {error.encoding.upper()} at byte {error.start}; save it as UTF-8"
        ) from error
    text = text if "\n" in text else text.replace("\r", "\n")  # the line ends of old Macs
    rows = _READERS[kind](path, text, known)
    if not rows:
        raise InputError(f"prompts={path} holds no prompt")
    for n, row in enumerate(rows):
        if wrong := next((key for key in row if key not in known), None):
            raise InputError(f"{path}: row {n + 1} has {wrong!r}, which no single sample has; {nearest(wrong, known)}")
    return rows


def _lines(path: str, text: str, known: list[str]) -> list[dict[str, Any]]:
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    return [{"prompt": line} for line in lines if line.strip()]


def _table(path: str, text: str, known: list[str]) -> list[dict[str, Any]]:
    csv.field_size_limit(1 << 24)
    told = _DELIMITER.match(text)
    text = text[told.end() :] if told else text
    head = text.partition("\n")[0].strip()
    fitting = (d for d in ("\t", ";") if d in head and {cell.strip().lower() for cell in head.split(d)} <= set(known))
    usual = "\t" if path.lower().endswith(".tsv") else ","
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=told[1] if told else next(fitting, usual), strict=True)
    try:
        names, *rows = [line for line in lines if any(line)] or [[]]
    except csv.Error as error:
        raise InputError(f"{path}: line {lines.line_num}: {error}") from error
    names = [name.strip().lower() for name in names]
    if twice := next((name for name in names if name and names.count(name) > 1), None):
        raise InputError(f"{path} has {names.count(twice)} columns {twice!r}; leave one of them")
    found = []
    for n, row in enumerate(rows, 1):
        if len(row) > len(names):
            raise InputError(f"{path}: row {n} has more cells than the first line; quote what holds a comma")
        cells = list(zip(names, row, strict=False))[0 if names[0] else 1 :]  # a table's index has no name
        if unnamed := next((cell for name, cell in cells if cell and not name), None):
            raise InputError(f"{path}: row {n} has {unnamed!r} in a column without a name; the first line names them")
        found.append({name: cell for name, cell in cells if cell})
    return found


def _list(path: str, text: str, known: list[str]) -> list[dict[str, Any]]:
    try:
        found = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, list):
        raise InputError(f"{path} is not a JSON list of objects")
    return _objects(path, "\n".join(json.dumps(row) for row in found), known)


def _objects(path: str, text: str, known: list[str]) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_once)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: line {number} is not JSON: {error}") from error
        row = {"prompt": row} if isinstance(row, str) else row
        if not isinstance(row, dict):
            raise InputError(f"{path}: line {number} is not a JSON object")
        if isinstance(row.get("shots"), list):
            row["shots"] = json.dumps(row["shots"], ensure_ascii=False)
        rows.append({key: value for key, value in row.items() if value is not None})
    return rows


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object from its pairs. Raises ValueError for a repeated key."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} comes twice in an object")
    return found


_READERS = {".txt": _lines, ".csv": _table, ".tsv": _table, ".jsonl": _objects, ".json": _list}
