"""Files of a checkpoint: manifest, checksums, retention, and durable writes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

VERSION = 2  # of the manifest; version 1 had no checksum of itself


class Damage(Exception):
    """A checkpoint is damaged; the message says how."""


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read and verify the manifest.json of a checkpoint. Raises Damage, OSError, ValueError or KeyError."""
    manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    own = manifest.pop("sha256", None)
    if manifest["version"] not in (1, VERSION):
        raise Damage(f"manifest.json is of version {manifest['version']}; this code reads 1 and {VERSION}")
    if own != (digest_of(manifest) if manifest["version"] > 1 else None):
        raise Damage("manifest.json differs from its own checksum")
    if f"step-{manifest['step']:08d}" != folder.name:
        raise Damage(f"manifest.json is of step {manifest['step']}")
    for name in manifest["files"]:
        if Path(name).name != name:
            raise Damage(f"manifest.json names {name!r}, which is no file of the checkpoint")
    return manifest


def check_file(path: Path, record: dict[str, Any], hashed: bool = True) -> None:
    """Compare a file's size, and with `hashed` its SHA-256, to its manifest entry. Raises Damage or OSError."""
    if path.stat().st_size != record["size"]:
        raise Damage(f"{path.name} has {path.stat().st_size} bytes instead of {record['size']}")
    if hashed and sha256(path) != record["sha256"]:
        raise Damage(f"{path.name} differs from its checksum")


def surplus(names: Sequence[str], keep: int, keep_every: int, best: str | None = None) -> list[str]:
    """Select the checkpoints to delete: all but the newest `keep`, the best, and multiples of `keep_every` steps.

    `names` are sorted, oldest first.
    """
    return [name for name in names[:-keep] if name != best and not stays(name, keep_every)]


def stays(name: str, keep_every: int) -> bool:
    """True if a checkpoint is kept for ever: its step is a multiple of `keep_every`, which isn't 0."""
    return keep_every > 0 and int(name.removeprefix("step-")) % keep_every == 0


def write_json(path: Path, value: dict[str, Any]) -> dict[str, Any]:
    """Write a JSON file and sync it to disk; returns its size and SHA-256."""
    with path.open("w") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    return {"size": path.stat().st_size, "sha256": sha256(path)}


def digest_of(value: dict[str, Any]) -> str:
    """SHA-256 of JSON values, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sha256(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove_folder(path: Path) -> None:
    """Delete a folder. It is renamed first, so that a kill leaves no partly deleted folder under its name.

    A link or a file at the path is deleted directly.
    """
    if path.is_symlink() or not path.is_dir():
        path.unlink()
        return
    away = path.with_name(f".tmp-old-{path.name}")
    shutil.rmtree(away, ignore_errors=True)
    path.rename(away)
    shutil.rmtree(away)


def sync_folder(folder: Path) -> None:
    """Sync the entries of a folder to disk (fsync), so that renames in it are durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
