"""The rights in each film, from `licences.toml`. Films without an allowed licence are left out and counted.

    allowed = ["CC0-1.0", "CC-BY-4.0", "public-domain"]

    [[source]]
    id = "nasa"                       # its name for data_tools.takedown
    match = ["nasa/*", "moon.mp4"]    # paths below videos=, with the wildcards * and ?
    licence = "public-domain"         # SPDX's name where it has one
    url = "https://images.nasa.gov"
    obtained = "downloaded 2026-11-30"
    consent = "not applicable"        # of recognisable people: yes, no, unknown, not applicable
    opt_out = false                   # whether the source is known to refuse training
    commercial = true

If several sources match a film, the first counts.
"""

from __future__ import annotations

import tomllib
import unicodedata
from dataclasses import asdict, dataclass, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from data_tools.curation.stage import Drop
from sora_train.core.cli import InputError, nearest

FILE = "licences.toml"
_CONSENT = ("yes", "no", "unknown", "not applicable")
_UNKNOWN = ("", "unknown", "none", "noassertion", "n/a")


@dataclass(frozen=True)
class Rights:
    """Record of where a film is from and what may be done with it."""

    id: str
    licence: str
    match: tuple[str, ...] = ("*",)
    url: str = ""
    obtained: str = ""
    consent: str = "unknown"
    opt_out: bool = False
    commercial: bool = True

    def record(self) -> dict[str, Any]:
        """The record as it is stored with a film: all fields except `match`."""
        return {name: value for name, value in asdict(self).items() if name != "match"}


@dataclass(frozen=True)
class Licences:
    """The sources of a folder of films, and the licences that may be used."""

    allowed: frozenset[str]
    sources: tuple[Rights, ...]

    def of(self, name: str) -> Rights:
        """The rights in a film, by its path below the folder. Raises Drop if it may not be used."""
        found = next((s for s in self.sources if any(_matches(name, one) for one in s.match)), None)
        if found is None:
            raise Drop("no licence", f"no source of {FILE} matches it")
        if found.licence.strip().lower() in _UNKNOWN:
            raise Drop("no licence", f"source {found.id} has none")
        if found.licence not in self.allowed:
            raise Drop("licence not allowed", f"{found.licence} of source {found.id}")
        if found.opt_out:
            raise Drop("opted out", f"source {found.id}")
        if found.consent == "no":
            raise Drop("no consent", f"source {found.id}")
        return found


def _matches(name: str, pattern: str) -> bool:
    """Tell whether a path matches a pattern. Brackets are literal, and Unicode normalisation is ignored."""
    shown, wanted = (unicodedata.normalize("NFC", text) for text in (name, pattern))
    return fnmatchcase(shown, wanted.replace("[", "[[]"))


def read_licences(folder: Path, file: str | None, licence: str | None) -> Licences:
    """Read the licences from `file` or FOLDER/licences.toml, or take `licence` for all films.

    Raises InputError if there is none, or if the file is invalid.
    """
    path = Path(file) if file else folder / FILE
    if licence is not None:
        if file or path.is_file():
            raise InputError(f"licence={licence} is for all films, and {path} tells them apart: give one of them")
        if licence.strip().lower() in _UNKNOWN:
            raise InputError(f"licence={licence} is none; give the licence under which all films may be used")
        return Licences(frozenset({licence}), (Rights("all", licence),))
    if not path.is_file():
        raise InputError(
            f"no film of {folder} has a licence: write {path} (docs/raw_footage.md), or give licence=NAME for all of "
            "them, such as licence=CC-BY-4.0"
        )
    try:
        told = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} can't be read: {error}") from error
    allowed, sources = told.get("allowed"), told.get("source")
    if not isinstance(allowed, list) or not _is_texts(allowed) or not isinstance(sources, list):
        raise InputError(f'{path} must have allowed = ["..."] and [[source]] entries')
    found = tuple(_rights(path, entry) for entry in sources)
    twice = [one.id for n, one in enumerate(found) if one.id in {other.id for other in found[:n]}]
    if twice:
        raise InputError(f"{path} has two sources with id = {twice[0]!r}")
    return Licences(frozenset(allowed), found)


def _rights(path: Path, entry: Any) -> Rights:
    kinds = {one.name: one for one in fields(Rights)}
    if not isinstance(entry, dict) or not {"id", "match", "licence"} <= set(entry):
        raise InputError(f"{path}: each [[source]] must have id, match and licence")
    for name, value in entry.items():
        if name not in kinds:
            raise InputError(f"{path}: source {entry['id']} has {name!r}; {nearest(name, list(kinds))}")
        wanted = bool if name in ("opt_out", "commercial") else str
        if name == "match":
            entry = entry | {
                "match": (value,) if isinstance(value, str) else tuple(value) if _is_texts(value) else None
            }
        elif type(value) is not wanted:
            raise InputError(
                f"{path}: source {entry['id']}: {name} must be {'text' if wanted is str else 'true or false'}"
            )
    if not entry["match"]:
        raise InputError(f"{path}: source {entry['id']}: match must be a path, or a list of them")
    if entry.get("consent", "unknown") not in _CONSENT:
        raise InputError(f"{path}: source {entry['id']}: consent must be one of {', '.join(_CONSENT)}")
    return Rights(**entry)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)
