"""Files of prompts: a line, a row or an object for each sample."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from sora_train.core.cli import InputError, nearest


def read_rows(path: str, known: list[str]) -> list[dict[str, Any]]:
    """The rows of a file of prompts: option keys, all of them known, and values. Raises InputError that names the row.

    `.txt`: a prompt a line, empty lines left out. `.csv`, `.tsv`: a column for each option, empty cells left out.
    `.jsonl`: an object a line; `.json`: a list of them.
    """
    kind = Path(path).suffix.lower()
    if kind not in _READERS:
        raise InputError(f"prompts={path} must be a {', '.join(_READERS)} file")
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"prompts={path} can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"prompts={path} is not UTF-8 at byte {error.start}; save it as UTF-8") from error
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
    head = text.partition("\n")[0].strip()
    fitting = (d for d in ("\t", ";") if d in head and {cell.strip().lower() for cell in head.split(d)} <= set(known))
    lines = io.StringIO(text, newline="")
    reader = csv.DictReader(lines, delimiter=next(fitting, "\t" if path.lower().endswith(".tsv") else ","), strict=True)
    try:
        reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or ()]
        rows = list(reader)
    except csv.Error as error:
        raise InputError(f"{path}: line {reader.line_num}: {error}") from error
    for n, row in enumerate(rows):
        if None in row:
            raise InputError(f"{path}: row {n + 1} has more cells than the first line; quote what holds a comma")
    return [{key: value for key, value in row.items() if value} for row in rows]


def _list(path: str, text: str, known: list[str]) -> list[dict[str, Any]]:
    try:
        found = json.loads(text)
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
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise InputError(f"{path}: line {number} is not a JSON object")
        if isinstance(row.get("shots"), list):
            row["shots"] = json.dumps(row["shots"], ensure_ascii=False)
        rows.append({key: value for key, value in row.items() if value is not None})
    return rows


_READERS = {".txt": _lines, ".csv": _table, ".tsv": _table, ".jsonl": _objects, ".json": _list}
