"""Matches the rows of a caption table to files, also if the table was written on another machine.

A path is resolved from the folder, from the table's folder and from the working directory. Otherwise it may come from
another machine; then it matches a file if one path ends with the other, ignoring case, the kind of slashes and a
missing extension. If two files or two rows match, the rows are refused: captions are never guessed.
"""

from __future__ import annotations

import os
import posixpath
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import unquote, urlsplit

from data_tools.captions import Bad, Refused, Row
from sora_train.data.read.decode import IMAGES, VIDEOS

Tail = tuple[str, ...]


class Matcher:
    """Finds files of a folder by their paths in a table."""

    def __init__(self, files: Iterable[str], folder: Path, table: Path, root: str | None = None) -> None:
        """Prepare the lookup.

        Args:
            files: Files, relative to `folder`.
            folder: Folder of the media.
            table: Path of the table.
            root: Path of the media folder on the machine where the table was written.
        """
        self._files = {unicodedata.normalize("NFC", file): file for file in files}
        self._bases = [str(folder), str(folder.resolve()), os.path.abspath(folder)]  # noqa: PTH100 - of no links
        self._places = [str(table.parent.resolve()), str(Path.cwd())]
        self._root = _normal(root) if root else None
        self._by_name: dict[str, list[tuple[Tail, str]]] = {}
        for path, file in self._files.items():
            parts = tuple(path.casefold().split("/"))
            self._by_name.setdefault(parts[-1], []).append((parts, file))
            stem = parts[-1].rpartition(".")[0]
            self._by_name.setdefault(stem, []).append(((*parts[:-1], stem), file))

    def match(self, rows: Iterable[Row]) -> tuple[dict[str, list[Row]], Bad]:
        """Match rows to files. Returns each file's rows in their order, and the other rows with reasons."""
        bad: Bad = []
        exact: dict[str, list[Row]] = {}
        guessed: dict[str, dict[str, list[Row]]] = {}  # file -> path as written -> rows
        for row in rows:
            found, is_exact = self._find(row.file)
            if isinstance(found, Refused):
                bad.append((row.file, Refused(found.kind, f"row {row.number}: {found.detail}")))
            elif is_exact:
                exact.setdefault(found, []).append(row)
            else:
                guessed.setdefault(found, {}).setdefault(_normal(row.file), []).append(row)
        for file, by_path in guessed.items():
            if len(by_path) == 1 and file not in exact:
                exact[file] = next(iter(by_path.values()))
                continue
            names = "the row of that very path" if file in exact else f"{len(by_path)} different paths of the table"
            for row in (row for group in by_path.values() for row in group):
                detail = f"row {row.number}: the nearest file, {file}, belongs to {names}"
                bad.append((row.file, Refused("caption without file", detail)))
        return exact, bad

    def _find(self, written: str) -> tuple[str | Refused, bool]:
        """Find the file of a path in the table, or the reason for there being none; and whether they match exactly."""
        name = _normal(written)
        for path in self._followed(name):
            if path in self._files:
                return self._files[path], True
        if self._root is not None and name.startswith(f"{self._root}/"):
            return Refused("caption without file", "there is no such file below root="), False
        parts = tuple(name.casefold().split("/"))
        near = self._by_name.get(parts[-1], [])
        whole = [(tail, file) for tail, file in near if parts[-len(tail) :] == tail]
        if whole:
            longest = max(len(tail) for tail, _ in whole)
            candidates = [file for tail, file in whole if len(tail) == longest]
        else:
            candidates = [file for tail, file in near if tail[-len(parts) :] == parts]
        if len({posixpath.splitext(file)[0] for file in candidates}) == 1:  # a video and its thumbnail
            candidates = [file for file in candidates if file.lower().endswith(VIDEOS)] or candidates
        if len(candidates) == 1:
            return candidates[0], False
        if candidates:
            return Refused(
                "caption without file", f"{len(candidates)} files have this name, such as {candidates[0]}"
            ), False
        if (os.sep in written and Path(written).exists()) or any((Path(base) / name).exists() for base in self._bases):
            detail = f"it is there, but is no {', '.join(VIDEOS + IMAGES)} in videos="
            return Refused("caption without file", detail), False
        hint = (
            f"there is no such file; {near[0][1]} has its name, in another folder" if near else "there is no such file"
        )
        return Refused("caption without file", hint), False

    def _followed(self, name: str) -> Iterable[str]:
        """Paths relative to the folder that a path may resolve to, in order of preference."""
        if self._root is not None and name.startswith(f"{self._root}/"):
            yield name.removeprefix(f"{self._root}/")
        paths = [name]
        if not posixpath.isabs(name):
            yield name
            paths = [posixpath.normpath(posixpath.join(place, name)) for place in self._places]
        for path in paths:
            for base in self._bases:
                if path.startswith(f"{base}/"):
                    yield unicodedata.normalize("NFC", path.removeprefix(f"{base}/"))


def _normal(written: str) -> str:
    """Normalise a path: single forward slashes, Unicode NFC; of a URL only its path."""
    name = written.strip()
    if "://" in name:
        name = unquote(urlsplit(name).path)
    return unicodedata.normalize("NFC", posixpath.normpath(name.replace("\\", "/")))
