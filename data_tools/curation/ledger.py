"""Record of each stage's outcome for each item: a line per item, written to disk before the item counts as done.

A line contains the digest of everything that the result depends on. The same command takes results from here and
computes the rest. After a change of a parameter or a film, only what depends on it is computed again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from data_tools.curation.stage import Outcome, Stage
from sora_train.core.cli import InputError


class Ledger:
    """`ledger/STAGE.jsonl` and the files of each stage, in an output folder."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self._known: dict[str, dict[str, Outcome]] = {}  # by stage, then digest
        (out / "ledger").mkdir(parents=True, exist_ok=True)

    def folder(self, stage: Stage) -> Path:
        """The folder of a stage's files."""
        place = self.out / "work" / stage.name
        place.mkdir(parents=True, exist_ok=True)
        return place

    def path(self, name: str) -> Path:
        """The ledger's file of a stage."""
        return self.out / "ledger" / f"{name}.jsonl"

    def outcome(self, stage: Stage, digest: str) -> Outcome | None:
        """Earlier outcome of a stage for an item; None if that isn't known, failed, or its files are gone."""
        found = self._of(stage.name).get(digest)
        if found is None or "failed" in found:
            return None
        kept = found.get("kept", {})
        folder = self.out / "work" / stage.name
        if any(kept.get(name) and not (folder / kept[name]).is_file() for name in stage.files):
            return None
        return found

    def add(self, stage: Stage, item_id: str, digest: str, outcome: Outcome) -> None:
        """Record an outcome. Raises InputError on a full disk."""
        known = self._of(stage.name)
        line = json.dumps({"id": item_id, "of": digest, **outcome}).encode() + b"\n"
        try:
            with self.path(stage.name).open("ab") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise full(self.out, error) from error
        known[digest] = outcome

    def keep(self, stays: Callable[[dict[str, Any]], bool]) -> int:
        """Remove the entries for which `stays` is false from the files of all stages. Returns their number."""
        gone = 0
        for path in sorted((self.out / "ledger").glob("*.jsonl")):
            entries = list(read_lines(path))
            kept = [entry for entry in entries if stays(entry)]
            gone += len(entries) - len(kept)
            write_lines(path, kept)
        self._known.clear()
        return gone

    def entries(self, name: str) -> list[dict[str, Any]]:
        """The entries of one stage, oldest first."""
        return list(read_lines(self.path(name)))

    def _of(self, name: str) -> dict[str, Outcome]:
        if name not in self._known:
            path = self.path(name)
            cut_half_line(path)
            self._known[name] = {
                entry["of"]: {kind: entry[kind] for kind in ("kept", "dropped", "failed") if kind in entry}
                for entry in read_lines(path)
            }
        return self._known[name]


def full(out: Path, error: OSError) -> InputError:
    """Build the error for an output folder that can't be written."""
    return InputError(f"{out} can't be written ({error.strerror}); make room, then give the same command")


def read_lines(path: Path) -> Iterable[dict[str, Any]]:
    """Yield the entries of a JSON-lines file, without an incomplete last line. Raises InputError for a damaged line."""
    if not path.is_file():
        return
    for line in path.read_bytes().splitlines(keepends=True):
        if not line.endswith(b"\n"):
            return
        try:
            yield json.loads(line)
        except ValueError as error:
            raise InputError(f"{path} is damaged ({error}); remove it to do its work again") from error


def cut_half_line(path: Path) -> None:
    """Remove an incomplete last line, left by a kill, from a file."""
    if path.is_file():
        data = path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.truncate(path, whole)


def write_lines(path: Path, entries: Iterable[dict[str, Any]]) -> None:
    """Write a file of JSON lines, atomically."""
    write_text(path, "".join(json.dumps(entry) + "\n" for entry in entries))


def write_text(path: Path, text: str) -> None:
    """Write a file of text, atomically."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
