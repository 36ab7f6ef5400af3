"""Finds the media files of a folder. Files that are passed over are listed or counted."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from data_tools.captions import SIDECARS, Names, Refused, sidecars_of
from sora_train.data.read.decode import IMAGES, VIDEOS

SPELLINGS = {"jpeg": "jpg", "jfif": "jpg"}  # extension -> the one that shards have for the same format
_TEXTS = ("txt", "caption", "json", "csv", "tsv", "jsonl", "ndjson", "parquet", "md")
_PIECE = 8 << 20


@dataclass
class Media:
    """Files below a folder, by relative path."""

    files: list[str] = field(default_factory=list)  # videos and images, sorted
    others: list[str] = field(default_factory=list)  # of no known kind, sorted
    texts: list[str] = field(default_factory=list)
    names: dict[str, Names] = field(default_factory=dict)  # of everything in each folder

    def beside(self, file: str) -> Names:
        """Names of the files in a file's folder."""
        return self.names[str(PurePosixPath(file).parent)]

    def thumbnail_of(self, file: str) -> str | None:
        """The video of the same name whose thumbnail an image without a sidecar may be; None if there is none."""
        path, names = PurePosixPath(file), self.beside(file)
        if extension_of(file) not in IMAGES or any(
            found.startswith(path.name) for found in sidecars_of(path.name, names)
        ):
            return None
        return next((found for video in VIDEOS if (found := names.find(f"{path.stem}.{video}")) is not None), None)

    def captioned_others(self) -> list[str]:
        """Files of unknown kind with a sidecar that belongs to no video or image."""
        media = {str(PurePosixPath(file).with_suffix("")) for file in self.files}
        return [
            file for file in self.others
            if str(PurePosixPath(file).with_suffix("")) not in media
            and sidecars_of(PurePosixPath(file).name, self.beside(file))
        ]  # fmt: skip

    def passed_over(self) -> list[str]:
        """Lines for the log on files that aren't media by their extension, and on texts without a media file."""
        lines = []
        counts = Counter(extension_of(file) or "no extension" for file in self.others)
        if counts:
            shown = ", ".join(f"{extension} {count}" for extension, count in counts.most_common(12))
            lines.append(f"passed over: {len(self.others)} files of other kinds ({shown})")
        all_files = self.files + self.others
        owners = {name for file in all_files for name in (file, str(PurePosixPath(file).with_suffix("")))}
        texts = [text for text in self.texts if extension_of(text) in SIDECARS]
        alone = [text for text in texts if str(PurePosixPath(text).with_suffix("")) not in owners]
        if alone:
            lines.append(f"passed over: {len(alone)} texts beside no video or image, such as {alone[0]}")
        return lines


def find_media(folder: Path) -> Media:
    """List the files below a folder, without names that begin with a dot. Links are followed, once per directory."""
    found = Media()
    seen: set[str] = set()
    for root, directories, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        directories[:] = [] if real in seen else sorted(d for d in directories if not d.startswith("."))
        if real in seen:
            continue
        seen.add(real)
        place = PurePosixPath(Path(root).relative_to(folder).as_posix())
        found.names[str(place)] = Names(names)
        for name in names:
            if not name.startswith("."):
                group = found.files if media_extension(name) else found.others
                (found.texts if extension_of(name) in _TEXTS else group).append(str(place / name))
    for group in (found.files, found.others, found.texts):
        group.sort()
    return found


def extension_of(name: str) -> str:
    """Extension of a name, in lower case."""
    return PurePosixPath(name).suffix[1:].lower()


def media_extension(name: str) -> str | None:
    """The extension that a video or image has in a shard; None for another file."""
    extension = SPELLINGS.get(extension_of(name), extension_of(name))
    return extension if extension in VIDEOS + IMAGES else None


def key_of(name: str) -> str:
    """The sample key of a relative path: readable, valid in any tar, reproducible, and unique to the path."""
    file, part = re.fullmatch(r"(.*?)(#[\d.e+-]+-(?:[\d.e+]+|inf)f?)?", name, re.DOTALL).groups("")  # type: ignore[union-attr]
    readable = re.sub(r"[^A-Za-z0-9_-]+", "_", str(PurePosixPath(file).with_suffix("")) + part)[-60:].strip("_")
    return f"{readable or 'sample'}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:10]}"


def check_file(path: Path) -> None:
    """Raise Refused for a file that isn't regular, can't be opened or is empty. Pipes aren't opened."""
    try:
        if path.exists() and not path.is_file():
            raise Refused("unreadable", "a pipe, socket or device, not a file")
        with path.open("rb") as media:
            if not media.read(1):
                raise Refused("empty file")
    except OSError as error:
        raise Refused("unreadable", error.strerror or str(error)) from error


def hash_of(path: Path) -> str:
    """Hash of a file, the same as `digest` of its bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]


def digest(data: bytes) -> str:
    """Hash of the bytes of a file or a caption: the first 32 hexadecimal digits of their SHA-256."""
    return hashlib.sha256(data).hexdigest()[:32]
