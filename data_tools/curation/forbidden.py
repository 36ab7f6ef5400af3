"""The user's list of forbidden material. Of a film that is on it, only the name is recorded.

A line is the hash of a file (MD5, SHA-1 or SHA-256, told apart by their length) or of a picture (16 hexadecimal digits,
as `hashes.py` computes them). Text after a space and lines that begin with # are ignored.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np

from data_tools.curation.hashes import distances
from sora_train.core.cli import InputError

NEAR = 6  # bits of 64 by which a picture may differ from one of the list
_KINDS = {32: "md5", 40: "sha1", 64: "sha256", 16: "picture"}


@dataclass
class Forbidden:
    """Hashes of forbidden files and pictures."""

    files: dict[str, set[str]] = field(default_factory=dict)  # by algorithm
    pictures: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))

    def has_file(self, digests: dict[str, str]) -> bool:
        """Tell whether a file with these digests, by algorithm, is on the list."""
        return any(digests[name] in known for name, known in self.files.items())

    def has_picture(self, hashes: tuple[int, int]) -> bool:
        """Tell whether a picture is near one of the list. `hashes` are those of the picture and of its mirror image."""
        asked = np.array(hashes, dtype=np.uint64)
        return bool((distances(asked[:, None], self.pictures[None]) <= NEAR).any())

    def algorithms(self) -> list[str]:
        """Hash algorithms of the files on the list."""
        return sorted(self.files)


@cache
def read_forbidden(path: str, digest: str) -> Forbidden:
    """Read the list at a path. Raises InputError for a line that is no hash.

    `digest` is the SHA-256 of the file: the cache must not return the list of an earlier content.
    """
    found = Forbidden()
    pictures = []
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"forbidden={path} is no text in UTF-8: {error}") from error
    for number, line in enumerate(text.splitlines(), 1):
        word = line.split()[0].lower() if line.strip() and not line.startswith("#") else ""
        kind = _KINDS.get(len(word)) if re.fullmatch(r"[0-9a-f]+", word) else None
        if kind == "picture":
            pictures.append(int(word, 16))
        elif kind:
            found.files.setdefault(kind, set()).add(word)
        elif word:
            raise InputError(f"forbidden={path}: line {number} is no MD5, SHA-1, SHA-256 or picture hash")
    found.pictures = np.array(pictures, dtype=np.uint64)
    return found


def list_parameters(path: str | None) -> dict[str, str]:
    """Path and digest of the list, for a stage's parameters; empty without a list. Raises InputError."""
    if path is None:
        return {}
    try:
        digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(f"forbidden={path} can't be read: {error.strerror}") from error
    read_forbidden(path, digest)
    return {"path": str(Path(path).resolve()), "digest": digest}
