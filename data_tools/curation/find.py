"""Finds the films of a folder and their rights; films that may not be used are dropped before they are read."""

from __future__ import annotations

from pathlib import Path

from data_tools.curation.ledger import read_lines
from data_tools.curation.licences import Licences
from data_tools.curation.stage import Drop, Item, Outcome
from data_tools.media_files import extension_of, find_media
from sora_train.data.read.decode import VIDEOS

TAKEN_DOWN = "takedowns.jsonl"  # of an output folder: sources and films that must not come back


def find_films(folder: Path, licences: Licences, out: Path) -> tuple[list[tuple[Item, Outcome]], list[str]]:
    """Find the films below a folder, sorted by name.

    Returns:
        The films with their outcomes: kept, or dropped because of their rights; and log lines on other files.
    """
    media = find_media(folder)
    sources, names = taken_down(out)
    found: list[tuple[Item, Outcome]] = []
    stills = 0
    for name in media.files:
        path = folder / name
        if extension_of(name) not in VIDEOS:
            stills += 1
            continue
        item: Item = {"id": name, "name": name, "path": str(path.resolve())}
        try:
            stat = path.stat()
            rights = licences.of(name)
            if rights.id in sources or name in names:
                raise Drop("taken down")
            found.append((item | {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, **rights_fields(rights.record())},
                          {"kept": {}}))  # fmt: skip
        except Drop as drop:
            found.append((item, {"dropped": [drop.reason, drop.detail]}))
        except OSError as error:
            found.append((item, {"failed": ["unreadable", error.strerror or str(error)]}))
    said = media.passed_over()
    return found, said + ([f"passed over: {stills} images, which are no footage"] if stills else [])


def rights_fields(record: Item) -> Item:
    """The fields of a film on its rights, from the record of its source."""
    return {"source": record["id"], "licence": record["licence"], "rights": record}


def taken_down(out: Path) -> tuple[set[str], set[str]]:
    """Sources, and names or hashes of films, that were taken down from an output folder."""
    entries = list(read_lines(out / TAKEN_DOWN))
    sources = {entry["source"] for entry in entries if entry.get("source")}
    return sources, {name for entry in entries for name in entry["films"] + entry["hashes"]}
