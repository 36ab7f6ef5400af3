"""Verification of a file by its manifest and its mark."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sora_train.core.cli import InputError
from sora_train.release.folder import ReleaseFolder
from sora_train.release.frames import read_frames
from sora_train.release.mark import BITS, Found
from sora_train.release.marks import mark_of
from sora_train.release.provenance import Manifest, read_manifest
from sora_train.release.safeguards import MARKS


@dataclass(frozen=True)
class Verified:
    """Findings about a file."""

    path: Path
    manifest: Manifest | None
    mark: Found | None  # None: not looked for, without a key or readable frames
    known: str  # id in the manifest or in this folder's records that the mark agrees with; empty: none

    @property
    def manifest_holds(self) -> bool:
        """Tell whether the file is unchanged since it was signed with a trusted certificate."""
        return self.manifest is not None and self.manifest.state == "Trusted"

    @property
    def mark_holds(self) -> bool:
        """Tell whether a mark with this folder's key was detected."""
        return self.mark is not None and self.mark.present

    @property
    def holds(self) -> bool:
        """Tell whether the manifest or the mark holds."""
        return self.manifest_holds or self.mark_holds

    def lines(self) -> list[str]:
        """The findings as text."""
        found = [f"{self.path}: {self._sum()}", *self._manifest_lines()]
        if self.mark is None:
            return [*found, "mark: not looked for (no release folder with its key, or no frames that can be read)"]
        if not self.mark.present:
            return [*found, f"mark: none (strength {self.mark.strength:.0f})"]
        whose = f"recorded id {self.known}" if self.known else f"id {self.mark.id}, not in the records"
        agreeing = f", {self.mark.agreeing(self.known)} of {BITS} bits" if self.known else ""
        return [*found, f"mark: holds, {whose}{agreeing} (strength {self.mark.strength:.0f})"]

    def _sum(self) -> str:
        held = [name for name, holds in (("manifest", self.manifest_holds), ("mark", self.mark_holds)) if holds]
        return (
            f"{' and '.join(held)} hold{'s' if len(held) == 1 else ''}" if held else "neither manifest nor mark holds"
        )

    def _manifest_lines(self) -> list[str]:
        if self.manifest is None:
            return ["manifest: none"]
        m = self.manifest
        state = {"Trusted": "holds", "Valid": "intact, but its certificate isn't trusted (trust=ROOT.pem)"}
        lines = [f"manifest: {state.get(m.state, 'broken')}; signed by {m.signer or 'nobody known'}"]
        if m.faults:
            lines.append(f"  faults: {', '.join(m.faults)}")
        shown = {"made by": m.source_type, **m.claims, "made from": ", ".join(m.ingredients)}
        return lines + [f"  {key}: {_text(value)}" for key, value in shown.items() if value not in ("", {}, None)]


def verify(path: Path, folder: ReleaseFolder | None, trust: str | None) -> Verified:
    """Verify a file's manifest and mark.

    Args:
        path: The file.
        folder: Release folder with the trusted roots and the mark's key; None: no mark is looked for.
        trust: File of root certificates (PEM) in place of the folder's.

    Raises:
        InputError: A file is missing or can't be read.
    """
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    roots = ""
    if trust is not None:
        try:
            roots = Path(trust).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise InputError(f"trust={trust} can't be read: {error}") from error
    elif folder is not None:
        roots = folder.text(folder.settings.trust)
    manifest = read_manifest(path, roots)
    mark = None if folder is None else mark_of(folder)
    if mark is None or folder is None:
        return Verified(path, manifest, None, "")
    try:
        found = mark.found(read_frames(path))
    except InputError:
        if manifest is None or not manifest.signer:
            raise
        return Verified(path, manifest, None, "")
    return Verified(path, manifest, found, _known(found, manifest, folder.path / MARKS))


def _known(found: Found, manifest: Manifest | None, records: Path) -> str:
    """Find the id that a detected mark agrees with: the manifest's, else the nearest of `records`; empty: none."""
    said = (manifest.claims.get("mark") or {}) if manifest is not None else {}
    if isinstance(said, dict) and found.present and found.is_that(str(said.get("id", "0"))):
        return str(said["id"])
    if not found.present or not records.is_file():
        return ""
    best = max(_ids(records), key=found.agreeing, default="")
    return best if best and found.is_that(best) else ""


def _ids(records: Path) -> set[str]:
    """Read the ids of a record of marks, without lines that a kill or a full disk cut short."""
    ids = set()
    for line in records.read_bytes().splitlines():
        try:
            id = str(json.loads(line)["mark"])
            int(id, 16)
        except (ValueError, KeyError, TypeError):
            continue
        ids.add(id)
    return ids


def file_hash(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
