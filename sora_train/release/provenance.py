"""Writes signed C2PA manifests into files, and reads them.

A manifest covers every byte of its file: remuxing drops it, and any change invalidates it. Signing must therefore be
the last change to a file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import c2pa

from sora_train.core.cli import InputError
from sora_train.release.folder import ReleaseFolder

ASSERTION = "org.sora_train.generation"
_SOURCE = "http://cv.iptc.org/newscodes/digitalsourcetype/"
MADE, PARTLY_MADE = "trainedAlgorithmicMedia", "compositeWithTrainedAlgorithmicMedia"
TYPES = {
    ".mp4": "video/mp4", ".mov": "video/quicktime", ".m4v": "video/mp4", ".avi": "video/avi", ".png": "image/png",
    ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".gif": "image/gif", ".webp": "image/webp",
}  # fmt: skip


def _context(roots: str = "", verify_after_sign: bool = False) -> c2pa.Context:
    """Context for signing or reading: no thumbnails, remote manifests or OCSP; `roots` (PEM) are trusted."""
    verify = {"remote_manifest_fetch": False, "ocsp_fetch": False, "verify_after_sign": verify_after_sign}
    trust = {"trust": {"user_anchors": roots}} if roots else {}
    return c2pa.Context.from_dict({"verify": verify, "builder": {"thumbnail": {"enabled": False}}, **trust})


_UNVERIFIED = _context()


@dataclass(frozen=True)
class Manifest:
    """A manifest that was read from a file."""

    state: str  # Trusted; Valid: unchanged, but signed by a certificate that isn't trusted; or Invalid
    signer: str
    issued: str  # time of signing by a time-stamping authority; empty without one
    claims: dict[str, Any]  # the generation assertion; empty: made by another program
    source_type: str  # C2PA's digitalSourceType, such as trainedAlgorithmicMedia
    ingredients: list[str]  # titles of the files that it was made from
    faults: list[str] = field(default_factory=list)  # codes of failed validations
    kept: int = 0  # number of manifests in the file: this one and those of its ingredients


def can_sign(suffix: str) -> bool:
    """Tell whether files with this ending can hold a manifest."""
    return suffix.lower() in TYPES


class Signing:
    """Signs files with the certificate of a release folder."""

    def __init__(self, folder: ReleaseFolder) -> None:
        """Load certificate and key. Raises InputError if they can't sign."""
        s, self._folder = folder.settings, folder
        chain, key = folder.text(s.certificate).encode(), folder.text(s.key).encode()
        try:
            self._signer = c2pa.Signer.from_info(c2pa.C2paSignerInfo(s.algorithm, chain, key, s.timestamps or None))
        except c2pa.C2paError as error:
            raise InputError(f"{folder.file(s.certificate)} and {s.key} can't sign: {_line(error)}") from error
        self._context = _context(verify_after_sign=True)

    def sign(
        self, draft: Path, path: Path, claims: Mapping[str, Any], given: Sequence[Path] = (), title: str | None = None
    ) -> None:
        """Sign `draft` into `path`, which is written atomically, and remove the draft.

        Args:
            draft: The finished file.
            path: Target, in the same folder as the draft.
            claims: Facts for the generation assertion.
            given: Images and videos it was made from: their own manifests are kept within this one.
            title: Name in the manifest; by default the target's file name.

        Raises:
            InputError: It can't be signed.
        """
        signed = path.with_name(f".{path.name[-200:]}.{os.getpid()}.signed")
        try:
            builder = self._builder(path, claims, given, title)
            with builder, draft.open("rb") as source, signed.open("w+b") as target:
                builder.sign(self._signer, TYPES[draft.suffix.lower()], source, target)
            signed.replace(path)
            self._context = _UNVERIFIED  # the first signature was verified, so the certificate works
            if draft != path:
                draft.unlink()
        except c2pa.C2paError as error:
            raise InputError(f"{path} can't be signed: {_line(error)}") from error
        finally:
            signed.unlink(missing_ok=True)

    def _builder(self, path: Path, claims: Mapping[str, Any], given: Sequence[Path], title: str | None) -> c2pa.Builder:
        s = self._folder.settings
        action: dict[str, Any] = {
            "action": "c2pa.created", "digitalSourceType": _SOURCE + (PARTLY_MADE if given else MADE),
            "softwareAgent": {"name": s.system, "version": str(claims.get("version", ""))},
        }  # fmt: skip
        if given:
            action["parameters"] = {"ingredientIds": [f"given-{n}" for n in range(len(given))]}
        definition = {
            "claim_generator_info": [{"name": s.system, "version": str(claims.get("version", ""))}],
            "title": title or path.name, "format": TYPES[path.suffix.lower()],
            "assertions": [
                {"label": "c2pa.actions.v2", "data": {"actions": [action]}},
                {"label": ASSERTION, "data": {"provider": s.provider, "system": s.system, **claims}},
            ],
        }  # fmt: skip
        builder = c2pa.Builder(definition, context=self._context)
        for number, file in enumerate(given):
            suffix = _suffix(file)
            about = {"title": file.name, "relationship": "inputTo", "instance_id": f"given-{number}"}
            if suffix in TYPES:
                with file.open("rb") as source:
                    builder.add_ingredient(about | {"label": f"given-{number}"}, TYPES[suffix], source)
        return builder


def read_manifest(path: Path, trusted: str = "") -> Manifest | None:
    """Read the manifest of a file; None if there is none, or if files of its type can't contain one.

    A damaged manifest has the state Invalid. `trusted` is the text of root certificates (PEM). Raises InputError if the
    file can't be read.
    """
    suffix = _suffix(path)
    if suffix not in TYPES:
        return None
    try:
        with path.open("rb") as file:
            reader = c2pa.Reader.try_create(TYPES[suffix], file, context=_context(trusted))
            if reader is None:
                return None
            with reader:
                store, state = json.loads(reader.json()), reader.get_validation_state() or "Invalid"
                faults = _faults(reader.get_validation_results() or {})
    except c2pa.C2paError as error:
        return Manifest("Invalid", "", "", {}, "", [], [_line(error)])
    except OSError as error:
        raise InputError(f"{path} can't be read: {error.strerror}") from error
    active = store["manifests"][store["active_manifest"]]
    signature = active.get("signature_info", {})
    claims: dict[str, Any] = next(
        (a["data"] for a in active.get("assertions", []) if a["label"].startswith(ASSERTION)), {}
    )
    ingredients = [str(one.get("title", "")) for one in active.get("ingredients", [])]
    signer = " / ".join(filter(None, (signature.get("issuer"), signature.get("common_name"))))
    return Manifest(
        state,
        signer,
        str(signature.get("time") or ""),
        claims,
        _source_type(active),
        ingredients,
        faults,
        len(store["manifests"]),
    )


def _source_type(manifest: Mapping[str, Any]) -> str:
    for assertion in manifest.get("assertions", []):
        if assertion["label"].startswith("c2pa.actions"):
            for action in assertion["data"].get("actions", []):
                if "digitalSourceType" in action:
                    return str(action["digitalSourceType"]).rpartition("/")[2]
    return ""


def _faults(results: Mapping[str, Any]) -> list[str]:
    active = results.get("activeManifest") or {}
    return sorted({str(one.get("code")) for one in active.get("failure", [])})


def _suffix(path: Path) -> str:
    """File extension by the file's first bytes, else by its name: extensions are often wrong."""
    with path.open("rb") as file:
        head = file.read(16)
    if head.startswith(b"\x89PNG"):
        return ".png"
    if head.startswith(b"\xff\xd8"):
        return ".jpg"
    if head.startswith(b"GIF8"):
        return ".gif"
    if head[:4] == b"RIFF":
        return ".webp" if head[8:12] == b"WEBP" else ".avi"
    return ".mov" if head[4:12] == b"ftypqt  " else ".mp4" if head[4:8] == b"ftyp" else path.suffix.lower()


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
