"""Finds samples whose caption or media file has changed since they were written, and rewrites their shards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from data_tools.candidates import Candidate, file_of
from data_tools.media_files import digest, hash_of, key_of
from data_tools.shard_writer import Journal, Mark, Members, ShardWriter
from sora_train.data.index.places import index_path
from sora_train.data.index.scan import members_of
from sora_train.data.index.tar import Member


@dataclass
class Changes:
    """Changed samples of shards by name: the new candidate, or None if the sample can't be used any more."""

    samples: dict[str, Candidate | None] = field(default_factory=dict)
    kinds: Counter[str] = field(default_factory=Counter)

    def __bool__(self) -> bool:
        return bool(self.samples)

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {kind}" for kind, count in self.kinds.most_common())
        return (
            f"{len(self.samples)} samples changed since they were built ({counts}; such as {next(iter(self.samples))})"
        )

    def done(self) -> str:
        """Text on the rewritten samples, which continues a sentence; empty if nothing changed."""
        return f", {len(self.samples)} of changed files written anew" if self.samples else ""


def find_changes(journal: Journal, folder: Path, candidates: Sequence[Candidate]) -> Changes:
    """Compare the samples of the shards with the folder. Samples whose file was deleted remain in their shard."""
    now = {candidate.name: candidate for candidate in candidates}
    found = Changes()
    for name, mark in journal.samples.items():
        path = folder / file_of(name)
        if not path.is_file():
            continue
        candidate = now.get(name)
        kind = "captions gone or refused" if candidate is None else _difference(path, mark, candidate)
        if kind:
            found.samples[name] = candidate
            found.kinds[kind] += 1
    return found


def _difference(path: Path, mark: Mark, candidate: Candidate) -> str:
    stat = path.stat()
    if stat.st_size != mark.size or (stat.st_mtime_ns != mark.mtime_ns and hash_of(path) != mark.media):
        return "videos or images"
    text = digest(candidate.text) if candidate.extension else ""
    return "captions" if text != mark.text else ""


def rewrite(
    journal: Journal,
    changes: Changes,
    build: Callable[[list[Candidate]], Iterable[tuple[Candidate, tuple[Mark, Members]]]],
) -> None:
    """Rewrite every shard that contains a changed sample. Its unchanged samples are copied, in the same order.

    The outdated index of a rewritten shard is deleted.

    Args:
        journal: Journal of the folder.
        changes: Samples to replace or remove.
        build: Builds samples from candidates, without the unusable ones.
    """
    for shard, samples in list(journal.shards.items()):
        again = [changes.samples[name] for name in samples if name in changes.samples]
        if not again:
            continue
        fresh = {candidate.name: made for candidate, made in build([c for c in again if c is not None])}
        path = journal.out / shard
        stored = members_of(str(path))[0]
        writer = ShardWriter(journal, float("inf"), name=shard)
        writer.open()
        with path.open("rb") as file:
            for name, mark in samples.items():
                if name in fresh:
                    writer.add(key_of(name), name, *fresh[name])
                elif name not in changes.samples:
                    writer.add(key_of(name), name, mark, stored_members(file, stored[key_of(name)][0]))
        writer.close()
        index_path(str(path)).unlink(missing_ok=True)


def stored_members(file: BinaryIO, members: Mapping[str, Member]) -> Members:
    """Read the members of a sample from its shard, unchanged."""
    found = []
    for extension, member in members.items():
        file.seek(member.offset)
        found.append((extension, file.read(member.size)))
    return found
