"""Roles of a caption table's columns: which one names the file, which has the caption, and so on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from sora_train.core.cli import InputError, nearest
from sora_train.data.index.captions import is_missing

WANTED = {  # role -> usual names of its column in trainers and data sets, in order of preference
    "file": (
        "file", "file_name", "filename", "file_path", "filepath", "path", "video", "video_path", "video_file",
        "video_name", "image", "image_path", "image_file", "media", "media_path",
    ),
    "caption": ("caption", "captions", "text", "prompt", "cap", "description", "sentences"),
    "start": ("start", "start_time", "start_sec", "start_seconds", "start_timestamp"),
    "end": ("end", "end_time", "end_sec", "end_seconds", "end_timestamp"),
    "start_frame": ("start_frame", "frame_start", "begin_frame", "start_frame_index"),
    "end_frame": ("end_frame", "frame_end", "stop_frame", "end_frame_index"),
}  # fmt: skip
RANGES = {  # columns with both ends of a range, [0, 48] (of frames also 0:48), or a list of ranges, one per caption
    "frames": ("cut", "frame_idx", "frame_range"), "times": ("timestamp", "timestamps", "time_range"),
}  # fmt: skip


@dataclass(frozen=True)
class Columns:
    """Column names given by the user, by role (`file`, `caption`, ...); other roles are found by their usual names."""

    told: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @staticmethod
    def parse(text: str | None) -> Columns:
        """Parse `file:NAME,caption:NAME+NAME,...`. Raises InputError for another form."""
        told: dict[str, tuple[str, ...]] = {}
        for part in filter(None, (part.strip() for part in (text or "").split(","))):
            what, colon, names = part.partition(":")
            what = what.strip()
            if not colon or not names.strip():
                raise InputError(f"columns={text}: {part!r} is not of the form file:NAME")
            if what not in WANTED:
                raise InputError(f"columns={text}: {what!r} is no use of a column; {nearest(what, list(WANTED))}")
            told[what] = tuple(name.strip() for name in names.split("+"))
            if what != "caption" and len(told[what]) > 1:
                raise InputError(f"columns={text}: only captions can be in several columns")
        return Columns(told)

    def fit(self, header: Iterable[str]) -> bool:
        """Tell whether a header has a column for the file and one for the caption."""
        names = list(header)
        return all(self._in(names, what) for what in ("file", "caption"))

    def special(self, header: Iterable[str]) -> set[str]:
        """Columns of a header that have a role, and so don't become fields of a sample."""
        names = list(header)
        found = {name for what in WANTED for name in self._in(names, what)}
        return found | {name for name in names if name.strip().lower() in ("caption", "captions")}

    def chosen(self, header: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """Column names of a header, by role. Roles without a column are left out."""
        names = list(header)
        return {what: found for what in WANTED if (found := self._in(names, what))}

    def of(self, record: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
        """Like `chosen`, for one record. Among the usual names of a role, one that has a value is preferred."""
        there = [name for name, value in record.items() if not (is_missing(value) or value == "")]
        return self.chosen(record) | self.chosen(there)

    def refuse(self, path: Path, line: str) -> NoReturn:
        """Raise InputError for a table whose first line has no header that fits."""
        shown = line.strip()[:80].encode("ascii", "backslashreplace").decode()
        told = [f"{what} {name!r}" for what, names in self.told.items() for name in names]
        if told:
            raise InputError(
                f"captions={path} doesn't have the columns told ({', '.join(told)}); its first line is {shown!r}"
            )
        raise InputError(
            f"captions={path}: the first line must name a column for the file ({', '.join(WANTED['file'][:6])}, ...) "
            f"and one for the caption ({', '.join(WANTED['caption'])}), or say columns=file:NAME,caption:NAME; "
            f"it is {shown!r}"
        )

    def _in(self, names: list[str], what: str) -> tuple[str, ...]:
        """Columns of the role `what`: the user's, or none if one is missing; for other roles by their usual names."""
        if what in self.told:
            return self.told[what] if set(self.told[what]) <= set(names) else ()
        known = {name.strip().lower().replace(" ", "_"): name for name in reversed(names)}
        return next(((known[name],) for name in WANTED[what] if name in known), ())
