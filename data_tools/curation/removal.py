"""Removes a source's films from an output folder: from shards, indexes, side tables, records and work files.

The films are recorded before anything is removed, so that the same command finishes a removal that was killed, and so
that the next `data_tools.curate` doesn't add the films again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import webdataset as wds

from data_tools.changes import Changes, rewrite, stored_members
from data_tools.curation.clips import sample_name
from data_tools.curation.find import TAKEN_DOWN
from data_tools.curation.ledger import Ledger, read_lines, write_lines, write_text
from data_tools.curation.output import SCORES, SOURCES, remove_files
from data_tools.curation.pipeline import HASHES, REPORT, SETTLED
from data_tools.media_files import key_of
from data_tools.shard_writer import Journal, opened_journal
from sora_train.core.cli import InputError
from sora_train.data.index.places import index_path
from sora_train.data.index.scan import members_of

_PIECE = re.compile(r"\+\d+$")  # suffix of a key in shards of latents


@dataclass
class Removal:
    """What to remove: films by name and hash, and the keys of their clips; and the checkpoints trained on them."""

    source: str
    films: list[str] = field(default_factory=list)
    hashes: list[str] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    checkpoints: list[str] = field(default_factory=list)

    @property
    def entry(self) -> dict[str, Any]:
        """The line of `takedowns.jsonl`."""
        return vars(self)


def find_removal(out: Path, source: str) -> Removal:
    """Find the films of a source (its id, a film's path or SHA-256) and their clips. Raises InputError without any."""
    ledger = Ledger(out)
    films = [entry for entry in read_lines(out / SOURCES) if source in (entry["id"], entry["film"], entry["sha256"])]
    earlier = [entry for entry in read_lines(out / TAKEN_DOWN) if entry["source"] == source]
    hashes = {film["sha256"] for film in films}
    names = {film["film"] for film in films} | {source} & {entry["id"] for entry in ledger.entries("probe")}
    for entry in ledger.entries("probe"):  # copies under other names, and films that were dropped
        if entry.get("kept", {}).get("sha256") in hashes or entry["id"] in names:
            names.add(entry["id"])
            hashes |= {entry["kept"]["sha256"]} if "kept" in entry else set()
    if not names and not earlier:
        known = sorted({entry["id"] for entry in read_lines(out / SOURCES)})
        raise InputError(
            f"{out} has no source, film or SHA-256 {source!r}; its sources: {', '.join(known[:12]) or 'none'}"
        )
    keys = set(_keys(ledger, names, hashes, opened_journal(out)))
    for entry in earlier:
        names, hashes, keys = names | set(entry["films"]), hashes | set(entry["hashes"]), keys | set(entry["keys"])
    checkpoints = sorted({place for entry in earlier for place in entry["checkpoints"]})
    return Removal(source, sorted(names), sorted(hashes), sorted(keys), checkpoints)


def _keys(ledger: Ledger, names: Collection[str], hashes: Collection[str], journal: Journal) -> Iterable[str]:
    for entry in ledger.entries("shots"):
        if entry["id"] in names:
            for sha256 in hashes:
                film = {"name": entry["id"], "sha256": sha256}
                yield from (key_of(sample_name(film, shot)) for shot in entry.get("kept", {}).get("shots", []))
    marks = {sha256[:16] for sha256 in hashes}
    yield from (key_of(sample) for sample in journal.samples if _mark_in(sample) in marks)


def _mark_in(sample: str) -> str:
    return sample.rpartition("#")[2].partition("-")[0]


def note(out: Path, removal: Removal) -> None:
    """Record in takedowns.jsonl what is to be removed, before anything is."""
    others = [entry for entry in read_lines(out / TAKEN_DOWN) if entry["source"] != removal.source]
    write_lines(out / TAKEN_DOWN, [*others, removal.entry])


def remove(out: Path, removal: Removal) -> int:
    """Remove the films from an output folder. Returns the number of samples that were removed from its shards."""
    keys, names = set(removal.keys), {*removal.films, *removal.hashes}
    journal = opened_journal(out)
    gone = {sample: None for sample in journal.samples if key_of(sample) in keys}
    rewrite(journal, Changes(dict(gone)), lambda again: ())
    for table in (SCORES, HASHES):
        _remove_rows(out / table, keys)
    for record, column in ((SOURCES, "film"), ("dropped.jsonl", "film"), ("dropped.jsonl", "id")):
        if (out / record).is_file():
            write_lines(out / record, [e for e in read_lines(out / record) if e[column] not in names | keys])
    if (out / SETTLED).is_file():
        write_text(out / SETTLED, json.dumps(sorted(set(json.loads((out / SETTLED).read_text())) - keys)))
    Ledger(out).keep(lambda entry: entry["id"] not in names | keys)
    remove_files(out, keys)
    for sha256 in removal.hashes:
        (out / "work" / "look" / f"{sha256[:32]}.npz").unlink(missing_ok=True)
    (out / REPORT).unlink(missing_ok=True)  # it has pictures of clips; the next `curate` writes it again
    return len(gone)


def remove_from_shard(shard: str, keys: Collection[str]) -> int:
    """Rewrite a shard without the samples of these keys, and delete its index. Returns how many were removed."""
    samples = members_of(shard)[0]
    gone = [key for key in samples if _PIECE.sub("", key) in keys]
    if gone:
        path = Path(shard)
        temporary = path.with_suffix(".tar.tmp")
        with path.open("rb") as file, wds.TarWriter(str(temporary), encoder=False, mtime=0) as tar:
            for key in (key for key in samples if key not in gone):
                for extension, data in stored_members(file, samples[key][0]):
                    tar.write({"__key__": key, extension: data})
        temporary.replace(path)
        index_path(shard).unlink(missing_ok=True)
    return len(gone)


def _remove_rows(path: Path, keys: Collection[str]) -> None:
    if path.is_file():
        table = pq.read_table(path)
        temporary = path.with_name(f".{path.name}.tmp")
        pq.write_table(table.filter(pc.invert(pc.is_in(table["key"], pa.array(sorted(keys), pa.string())))), temporary)
        temporary.replace(path)
