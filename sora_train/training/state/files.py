"""Files of a checkpoint that are whole or not there, and their checksums."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

VERSION = 2  # of the manifest; 1 had no checksum of itself


class Damage(Exception):
    """What is wrong with a checkpoint."""


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest.json of a checkpoint, true to its own checksum. Raises Damage, OSError, ValueError, KeyError."""
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
    """Raise Damage where a file isn't what the manifest records of it; OSError where it can't be read."""
    if path.stat().st_size != record["size"]:
        raise Damage(f"{path.name} has {path.stat().st_size} bytes instead of {record['size']}")
    if hashed and sha256(path) != record["sha256"]:
        raise Damage(f"{path.name} differs from its checksum")


def surplus(names: Sequence[str], keep: int, keep_every: int) -> list[str]:
    """Which of these checkpoints, oldest first, needn't be kept: not of the newest, nor of a step that stays."""
    return [name for name in names[:-keep] if not stays(name, keep_every)]


def stays(name: str, keep_every: int) -> bool:
    """Whether a checkpoint is kept for ever: its step is a multiple of `keep_every` (0: none is)."""
    return keep_every > 0 and int(name.removeprefix("step-")) % keep_every == 0


def write_json(path: Path, value: dict[str, Any]) -> dict[str, Any]:
    """Write JSON through to the disk; returns its size and SHA-256."""
    with path.open("w") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    return {"size": path.stat().st_size, "sha256": sha256(path)}


def digest_of(value: dict[str, Any]) -> str:
    """SHA-256 of JSON values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sha256(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove_folder(path: Path) -> None:
    """Take a folder away in one rename first, so that a kill leaves no half of it under its name.

    What isn't a folder (a link, a file that somebody put there) just goes.
    """
    if path.is_symlink() or not path.is_dir():
        path.unlink()
        return
    away = path.with_name(f".tmp-old-{path.name}")
    shutil.rmtree(away, ignore_errors=True)
    path.rename(away)
    shutil.rmtree(away)


def sync_folder(folder: Path) -> None:
    """Have the disk know the names in a folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
