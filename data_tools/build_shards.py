"""Turn a folder of captioned videos and images into WebDataset shards.

    python -m data_tools.build_shards videos=DIR out=DIR [captions=FILE] [shard_size=256] [workers=null]
        [probe=frame]

Captions come from a table (`captions=`: .csv, .tsv or .jsonl with a file and a caption column; other columns are kept)
or from `NAME.txt` beside `NAME.mp4`. Media bytes are copied unchanged. The first frame of every file is decoded before
it is accepted (`probe=packets` reads headers only). Refused files are listed in `refused.jsonl` with the reason.
`shard_size` is in MiB. Files whose names begin with a dot are ignored. Give the same command again to resume after an
interruption, or to append new files; `build.jsonl` records the contents of each shard.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from data_tools.captions import Refused, Row, match, read_sidecar, read_table, row_json
from data_tools.progress import progress
from data_tools.shard_writer import Journal, ShardWriter
from sora_train.config.schema import Probe
from sora_train.core.cli import InputError, options, run
from sora_train.data.read.decode import IMAGES, VIDEOS, DecodeError
from sora_train.data.read.pool import Pool


@dataclass
class Options:
    """The command's options; see the head of this file."""

    videos: str = ""
    out: str = ""
    captions: str | None = None
    shard_size: float = 256.0  # MiB
    workers: int | None = None
    probe: Probe = Probe.frame  # here what is refused can still be seen to


@dataclass(frozen=True)
class Candidate:
    """A media file with a caption, not decoded yet: its path relative to the folder, and its text member."""

    file: str
    text_extension: str  # txt or json
    text: bytes


class Refusals:
    """Everything that was left out and why; each is printed as it comes."""

    def __init__(self) -> None:
        self.entries: list[dict[str, str]] = []

    def add(self, file: str, reason: Refused) -> None:
        """Take down one refusal."""
        self.entries.append({"file": file, "reason": reason.kind, "detail": reason.detail})
        print(f"refused: {file}: {reason}".encode("utf-8", "backslashreplace").decode(), flush=True)

    def write(self, path: Path) -> None:
        """Write one JSON object per refusal, replacing an earlier list."""
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(entry) + "\n" for entry in self.entries), encoding="utf-8")
        temporary.replace(path)

    def __str__(self) -> str:
        counts = Counter(entry["reason"] for entry in self.entries)
        return f"{len(self.entries)} refused" + "".join(f", {n} {kind}" for kind, n in counts.most_common())


def main() -> int:
    """Build the shards that the command line describes."""
    asked = options(Options, __doc__)
    folder, out = _checked(asked)
    files = find_media(folder)
    if not files:
        raise InputError(f"no video or image in {folder}; looked for {', '.join(VIDEOS + IMAGES)}")
    refusals = Refusals()
    rows = _rows(asked.captions, files, folder, refusals)
    limit = int(asked.shard_size * 2**20)
    journal = Journal(out, {"videos": str(folder.resolve()), "shard_size": limit})
    pending = _candidates(folder, files, rows, journal.files, refusals)
    workers = asked.workers or os.cpu_count() or 1
    verdicts = _probe_all([folder / candidate.file for candidate in pending], workers, asked.probe)
    added = _build(folder, pending, verdicts, ShardWriter(journal, limit), refusals)
    refusals.write(out / "refused.jsonl")
    if not journal.files:
        raise InputError(f"none of the {len(files)} files in {folder} can be used; {out / 'refused.jsonl'} says why")
    total = f"{len(journal.files)} samples in {len(journal.shards)} shards; {refusals}"
    print(f"{out}: {added} samples added, {total}" if added else f"{out}: nothing to add, {total}")
    return 0


def find_media(folder: Path) -> list[str]:
    """Relative paths of all videos and images below a folder, sorted; links are followed, once per directory."""
    found: list[str] = []
    seen: set[str] = set()
    for root, directories, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        directories[:] = [] if real in seen else sorted(d for d in directories if not d.startswith("."))
        if real not in seen:
            found += [
                (Path(root) / name).relative_to(folder).as_posix()
                for name in names
                if not name.startswith(".") and _extension(name) in VIDEOS + IMAGES
            ]
        seen.add(real)
    return sorted(found)


def key_of(file: str) -> str:
    """The sample key of a relative path: readable, safe in any tar, the same in every run, one per path."""
    readable = re.sub(r"[^A-Za-z0-9_-]+", "_", str(PurePosixPath(file).with_suffix("")))[-60:].strip("_")
    return f"{readable or 'sample'}-{hashlib.sha256(os.fsencode(file)).hexdigest()[:10]}"


def _checked(asked: Options) -> tuple[Path, Path]:
    missing = [f"{name}=..." for name in ("videos", "out") if not getattr(asked, name)]
    if missing:
        raise InputError(f"missing: {', '.join(missing)}; --help shows what they mean")
    if asked.shard_size <= 0 or (asked.workers or 1) < 1:
        raise InputError("shard_size must be above 0 and workers at least 1")
    folder, out = Path(asked.videos), Path(asked.out)
    if not folder.is_dir():
        raise InputError(f"videos={folder} is {'not a folder' if folder.exists() else 'not there'}")
    if asked.captions and not Path(asked.captions).is_file():
        raise InputError(f"captions={asked.captions} is not a file")
    return folder, out


def _rows(captions: str | None, files: list[str], folder: Path, refusals: Refusals) -> dict[str, Row]:
    """The table's row for each file that has one; empty without a table."""
    if not captions:
        return {}
    rows, bad = read_table(Path(captions))
    matched, unmatched = match(rows, files, folder)
    for name, reason in bad + unmatched:
        refusals.add(name, reason)
    return matched


def _candidates(
    folder: Path, files: list[str], rows: dict[str, Row], done: dict[str, str], refusals: Refusals
) -> list[Candidate]:
    """The files to decode, in order: readable, captioned, in no shard yet, and no copy of another."""
    candidates = []
    for file in files:
        if file not in done:
            try:
                candidates.append(_candidate(folder, file, rows.get(file)))
            except Refused as reason:
                refusals.add(file, reason)
    copies = _copies(folder, [f for f in files if f in done and (folder / f).is_file()] + [c.file for c in candidates])
    for candidate in candidates:
        if candidate.file in copies:
            refusals.add(candidate.file, Refused("duplicate", f"the same bytes as {copies[candidate.file]}"))
    return [candidate for candidate in candidates if candidate.file not in copies]


def _candidate(folder: Path, file: str, row: Row | None) -> Candidate:
    path = folder / file
    try:
        with path.open("rb") as media:
            if not media.read(1):
                raise Refused("empty file")
    except OSError as error:
        raise Refused("unreadable", error.strerror or str(error)) from error
    if row is not None:
        fields = row_json(row)
        if set(fields) != {"caption"}:
            return Candidate(file, "json", json.dumps(fields).encode())
        return Candidate(file, "txt", fields["caption"].encode())
    text = read_sidecar(path)
    if text is None:
        raise Refused("no caption", f"no row in captions= and no {path.with_suffix('.txt').name}")
    return Candidate(file, "txt", text.encode())


def _copies(folder: Path, files: list[str]) -> dict[str, str]:
    """Files whose bytes are those of an earlier one in the list, with that one. Only equal sizes are compared."""
    by_size: dict[tuple[str, int], list[str]] = {}
    for file in files:
        by_size.setdefault((_extension(file), (folder / file).stat().st_size), []).append(file)
    copies: dict[str, str] = {}
    for group in by_size.values():
        first: dict[bytes, str] = {}
        for file in group if len(group) > 1 else []:
            with (folder / file).open("rb") as media:
                digest = hashlib.file_digest(media, "sha256").digest()
            if first.setdefault(digest, file) != file:
                copies[file] = first[digest]
    return copies


def _build(
    folder: Path,
    pending: list[Candidate],
    verdicts: Iterator[Refused | None],
    writer: ShardWriter,
    refusals: Refusals,
) -> int:
    """Write the candidates that can be used, and return their number."""
    added = 0
    if not pending:
        return added
    with progress(len(pending), "building shards") as advance:
        for candidate, refused in zip(pending, verdicts, strict=True):
            try:
                if refused:
                    raise refused
                data = (folder / candidate.file).read_bytes()
                extension = _extension(candidate.file).replace("jpeg", "jpg")
                members = ((extension, data), (candidate.text_extension, candidate.text))
                writer.add(key_of(candidate.file), candidate.file, members)
                added += 1
            except OSError as error:
                refusals.add(candidate.file, Refused("unreadable", error.strerror or str(error)))
            except Refused as reason:
                refusals.add(candidate.file, reason)
            advance(1)
    writer.close()
    return added


def _probe_all(paths: list[Path], workers: int, probe: Probe) -> Iterator[Refused | None]:
    """Probe files side by side; for each, in order, why it can't be used, or None. A file that hangs is given up."""
    kinds = {"not_a_video": "not a video", "empty": "empty file", "missing": "unreadable"}
    with Pool(workers) as pool:
        waiting: deque[Future[dict[str, Any]]] = deque()
        rest = iter(paths)
        for _ in paths:
            for path in islice(rest, 8 * workers - len(waiting)):
                waiting.append(pool.probe(str(path), _extension(path.name), pixels=probe is Probe.frame))
            try:
                waiting.popleft().result()
                yield None
            except DecodeError as error:
                yield Refused(kinds.get(error.cause, "undecodable"), str(error))


def _extension(name: str) -> str:
    return PurePosixPath(name).suffix[1:].lower()


if __name__ == "__main__":
    run(main)
