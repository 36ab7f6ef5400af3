"""Finds the samples to build from a folder and its captions, without decoding any media; refuses unusable files."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from data_tools.captions import TABLES, Names, Refused, Row, read_table, sidecar
from data_tools.columns import Columns
from data_tools.cut import Part
from data_tools.matching import Matcher
from data_tools.media_files import Media, check_file, extension_of
from sora_train.core.cli import InputError
from sora_train.data.index.captions import with_captions

NONE = "none"  # value of captions=: samples without captions
_PART = re.compile(r"#[\d.e+-]+-([\d.e+]+|inf)f?$")  # at the end of the name of a part


@dataclass(frozen=True)
class CaptionOptions:
    """Source of captions: a table, a folder of texts, `none`, or (None) the sidecar files beside the media."""

    captions: str | None = None
    columns: Columns = field(default_factory=Columns)
    encoding: str | None = None
    root: str | None = None  # path of the media folder on the machine where the table was written


@dataclass(frozen=True)
class Candidate:
    """A sample that may be built: a media file or a part of one, and its text member."""

    file: str  # relative to the folder
    part: Part | None
    extension: str  # of the text member: txt or json; empty without captions
    text: bytes
    fields: dict[str, Any] = field(compare=False)

    @property
    def name(self) -> str:
        """Unique name of the sample in its folder."""
        return self.file if self.part is None else f"{self.file}#{self.part}"

    def group(self, source: str) -> str:
        """Group that must not be split between training and validation: its file, folder, or value of a field.

        `source` is `file`, `folder`, or the name of a field.
        """
        if source == "folder":
            return str(PurePosixPath(self.file).parent)
        return self.file if source == "file" else f"{source}={self.fields.get(source)}"


def file_of(name: str) -> str:
    """The file of a sample with this name: the name without its part."""
    return _PART.sub("", name)


class Refusals:
    """List of what was left out and why. Each refusal is printed when it is added."""

    def __init__(self) -> None:
        self.entries: list[dict[str, str]] = []

    def add(self, file: str, reason: Refused) -> None:
        """Record and print one refusal."""
        self.entries.append({"file": file, "reason": reason.kind, "detail": reason.detail})
        say(f"refused: {file}: {reason}")

    def write(self, path: Path) -> None:
        """Write one JSON object per refusal, replacing an earlier list."""
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(entry) + "\n" for entry in self.entries), encoding="utf-8")
        temporary.replace(path)

    def __str__(self) -> str:
        counts = Counter(entry["reason"] for entry in self.entries)
        return f"{len(self.entries)} refused" + "".join(f", {n} {kind}" for kind, n in counts.most_common())


def say(line: str) -> None:
    """Print a line; characters in it that aren't valid UTF-8, as file names may have, are escaped."""
    print(line.encode("utf-8", "backslashreplace").decode(), flush=True)


def find_candidates(folder: Path, media: Media, options: CaptionOptions, refusals: Refusals) -> list[Candidate]:
    """Find the samples to build, in the order of their files. Prints which files are passed over."""
    for line in media.passed_over():
        say(line)
    for file in media.captioned_others():
        refusals.add(
            file, Refused("unknown kind", f".{extension_of(file)} is not read; convert it, for example to .mp4")
        )
    rows = _rows(folder, media, options, refusals)
    texts = _Texts(folder, media, options)
    found: list[Candidate] = []
    for file in media.files:
        try:
            video = media.thumbnail_of(file)
            if video is not None and file not in rows:
                raise Refused(
                    "thumbnail", f"beside {video}; give it a caption of its own ({Path(file).name}.txt) to use it"
                )
            check_file(folder / file)
            if options.captions == NONE:
                found.append(Candidate(file, None, "", b"", {}))
            elif file in rows:
                found += _of_rows(file, rows[file], refusals)
            else:
                found.append(_candidate(file, None, texts.of(file)))
        except Refused as reason:
            refusals.add(file, reason)
    return found


def _rows(folder: Path, media: Media, options: CaptionOptions, refusals: Refusals) -> dict[str, list[Row]]:
    """Rows of the caption table by file; empty without a table. Raises InputError if no row matches a file."""
    path = Path(options.captions) if options.captions not in (None, NONE) else _own_table(folder, media, options)
    if path is None or path.is_dir():
        return {}
    table = read_table(path, options.columns, options.encoding)
    say(table.said)
    matched, unmatched = Matcher(media.files, folder, path, options.root).match(table.rows)
    for name, reason in table.bad + unmatched:
        refusals.add(name, reason)
    if not matched:
        raise InputError(
            f"captions={path}: none of its {len(table.rows)} rows names a file of videos={folder}; it has "
            f"{table.rows[0].file!r}, the folder {media.files[0]!r}: say root=FOLDER (what stood for videos= where the "
            "table was written), or columns=file:NAME"
        )
    return matched


def _own_table(folder: Path, media: Media, options: CaptionOptions) -> Path | None:
    """The folder's metadata table in Hugging Face's layout, if there is one with a column `file_name`."""
    if options.captions == NONE:
        return None
    for name in TABLES:
        if (found := media.names["."].find(name)) is not None:
            try:
                named = "file from 'file_name'" in read_table(folder / found, options.columns, options.encoding).said
            except InputError as error:
                say(f"{folder / found} is not read: {error}")
                continue
            if named:
                return folder / found
    return None


class _Texts:
    """Reads the sidecars of files: from a folder of texts with the same relative paths, else from beside the files."""

    def __init__(self, folder: Path, media: Media, options: CaptionOptions) -> None:
        self._folder, self._media, self._encoding = folder, media, options.encoding
        self._texts = Path(options.captions) if options.captions and Path(options.captions).is_dir() else None
        self._names: dict[Path, Names] = {}

    def of(self, file: str) -> dict[str, Any]:
        """Read a file's captions and fields. Raises Refused if it has none, or invalid ones."""
        found = None
        if self._texts is not None:
            place = self._texts / file
            found = sidecar(place, self._in(place.parent), self._encoding)
        if found is None:
            found = sidecar(self._folder / file, self._media.beside(file), self._encoding)
        if found is None:
            raise Refused("no caption", f"no row in captions= and no {PurePosixPath(file).with_suffix('.txt').name}")
        return found

    def _in(self, folder: Path) -> Names:
        if folder not in self._names:
            self._names[folder] = Names(os.listdir(folder) if folder.is_dir() else ())  # noqa: PTH208 - names alone
        return self._names[folder]


def _of_rows(file: str, rows: list[Row], refusals: Refusals) -> Iterator[Candidate]:
    """Yield a sample for each part of a file that rows refer to, with the captions of all rows of that part.

    Rows with invalid captions are refused.
    """
    parts: dict[Part | None, list[Row]] = {}
    for row in rows:
        parts.setdefault(row.part, []).append(row)
    for part, group in parts.items():
        good = [row for row in group if not isinstance(row.captions, Refused)]
        for row in group:
            if isinstance(row.captions, Refused):
                refusals.add(file, row.captions)
        if good:
            yield _candidate(file, part, with_captions(_joined(file, good, refusals), good[0].fields))


def _joined(file: str, rows: list[Row], refusals: Refusals) -> dict[str, str]:
    """Merge the captions of several rows of one file under distinct names; repeated texts are refused.

    Returns the captions by name.
    """
    captions: dict[str, str] = {}
    seen: dict[str, int] = {}
    for row in rows:
        assert not isinstance(row.captions, Refused)
        if row.fields != rows[0].fields:
            say(
                f"note: {file}: other columns of row {row.number} differ from those of row {rows[0].number}, which stay"
            )
        for name, text in row.captions.items():
            if seen.setdefault(text, row.number) != row.number:
                detail = f"row {row.number}: row {seen[text]} has the same caption for the same file"
                refusals.add(row.file, Refused("duplicate", detail))
            elif len(rows) == 1:
                captions[name] = text
            else:
                captions[f"{name}_{len(captions)}" if name else str(len(captions))] = text
    return {"": next(iter(captions.values()))} if set(captions) == {"0"} else captions


def _candidate(file: str, part: Part | None, fields: dict[str, Any]) -> Candidate:
    if set(fields) == {"caption"}:
        return Candidate(file, part, "txt", fields["caption"].encode(), fields)
    return Candidate(file, part, "json", json.dumps(fields).encode(), fields)
