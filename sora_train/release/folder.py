"""The release folder: the keys, certificate and settings with which videos are marked, signed and guarded.

`release init` makes it, once per user and machine. If it exists, `sample` and the service use it.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from sora_train.core.cli import InputError
from sora_train.core.options import choice, number, read

VARIABLE = "SORA_TRAIN_RELEASE"  # the folder, or off; if unset, the folder is in the user's configuration folder
OFF = "off"
_SETTINGS = "release.json"
_MARK_KEY, _LEAST_KEY = "mark.key", 16  # file of the key, and its least length in bytes


@dataclass
class Settings:
    """Content of `release.json`; paths are absolute or within the folder."""

    provider: str  # who is responsible for the videos: the name in manifests and certificates
    system: str = "sora_train"  # name of the generating system
    contact: str = ""  # where reports go; the service's page shows it
    sign: bool = True
    mark: str = "classical"  # classical, none, or the path of a VideoSeal TorchScript file
    certificate: str = "chain.pem"  # the signing certificate and its intermediates, without the root
    key: str = "sign.key"
    algorithm: str = choice(("es256", "es384", "ps256", "ed25519"), "es256")
    trust: str = "root.pem"  # certificates that `verify` trusts
    timestamps: str = ""  # URL of a time-stamping authority; empty: no time stamps
    guard: bool = True
    guard_words: str = "words.txt"  # word list; empty: none
    guard_endpoint: str = ""  # of an OpenAI-compatible server: http://host:port/v1
    guard_api: str = choice(("moderations", "chat"), "moderations")
    guard_model: str = ""  # the server's name of the model
    guard_images: bool = False  # send frames to the endpoint's model too
    guard_text_folder: str = ""  # a local text classifier
    guard_image_folder: str = ""  # a local image classifier
    guard_threshold: float = number(0.5, least=0, most=1)  # least score of a local classifier's class that counts
    guard_safe_classes: str = "safe,normal,neutral,sfw,ok"  # classes of a local classifier that never count
    guard_seconds: float = number(20.0, above=0, most=600)  # time-out of a request to the endpoint
    guard_fails: str = choice(("closed", "open"), "closed")  # if a guard doesn't answer: refuse, or let through


class ReleaseFolder:
    """A release folder and its settings."""

    def __init__(self, path: Path) -> None:
        """Read the settings. Raises InputError if they can't be read."""
        self.path = path
        try:
            found = json.loads((path / _SETTINGS).read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(
                f"{path} holds no {_SETTINGS} ({error.strerror}); python -m sora_train.release init"
            ) from error
        except ValueError as error:
            raise InputError(f"{path / _SETTINGS} is not JSON ({error})") from error
        try:
            self.settings = read(Settings, found)
        except InputError as error:
            raise InputError(f"{path / _SETTINGS}: {error}") from error

    def discard(self) -> None:
        """Remove the settings: the folder is then unfinished, and can be made again with the same keys."""
        (self.path / _SETTINGS).unlink()

    def file(self, name: str) -> Path:
        """Path of the file that a setting names; a relative one is within the folder."""
        return self.path / Path(name).expanduser()

    def text(self, name: str) -> str:
        """The text of a file that a setting names. Raises InputError."""
        try:
            return self.file(name).read_text(encoding="utf-8-sig")
        except (OSError, ValueError) as error:
            raise InputError(f"{self.file(name)} can't be read ({error}); see {self.path / _SETTINGS}") from error

    def mark_key(self) -> bytes:
        """Read the secret key for embedding marks and hashing prompts. Raises InputError."""
        try:
            key = bytes.fromhex(self.text(_MARK_KEY).strip())
        except ValueError as error:
            raise InputError(f"{self.file(_MARK_KEY)} is no key ({error}); take it from your backup") from error
        if len(key) < _LEAST_KEY:
            raise InputError(f"{self.file(_MARK_KEY)} is too short to be a key; take it from your backup")
        return key

    def append(self, name: str, entry: dict[str, object]) -> None:
        """Append an entry to a record of the folder (JSON Lines), in one write."""
        append_line(self.path / name, entry)


def default_path() -> Path:
    """Path of the folder if `release=` names none: from the environment, else in the user's configuration folder."""
    named = os.environ.get(VARIABLE, OFF)
    if named != OFF:
        return Path(named).expanduser()
    configuration = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(configuration).expanduser() / "sora_train" / "release"


def find(named: str | None) -> ReleaseFolder | None:
    """Open the folder of `release=FOLDER|off`, or the default one if it exists; None if it doesn't, or with `off`.

    Raises InputError if a named folder has no readable settings.
    """
    named = named if named is not None else os.environ.get(VARIABLE)
    if named == OFF:
        return None
    if named is not None:
        return ReleaseFolder(Path(named).expanduser())
    path = default_path()
    return ReleaseFolder(path) if (path / _SETTINGS).exists() else None


def make(path: Path, settings: Settings, fill: Callable[[Path], None]) -> ReleaseFolder:
    """Make a release folder that only its owner can read, with a new mark key.

    Args:
        path: Where to make it.
        settings: Its settings. They are written last: a folder without them is unfinished, and can be made again.
        fill: Writes the folder's other files.

    Raises:
        InputError: The folder exists, or can't be written.
    """
    if (path / _SETTINGS).exists():
        raise InputError(f"{path} is a release folder already; its keys are in use: change {path / _SETTINGS} instead")
    try:
        path.mkdir(parents=True, exist_ok=True)
        path.chmod(0o700)
        if not (path / _MARK_KEY).exists():
            write_secret(path / _MARK_KEY, secrets.token_hex(32).encode() + b"\n")
        fill(path)
        text = json.dumps(asdict(settings), indent=1, ensure_ascii=False) + "\n"
        unfinished = path / f".{_SETTINGS}.{os.getpid()}"
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path / _SETTINGS)
    except OSError as error:
        raise InputError(f"{path} can't be written: {error.strerror or error}") from error
    return ReleaseFolder(path)


def write_secret(path: Path, content: bytes) -> None:
    """Write a file that is created with read access for its owner only."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)


def append_line(path: Path, entry: Mapping[str, object]) -> None:
    """Append a JSON object as one line to a file, which is created with read access for its owner only."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        os.write(descriptor, json.dumps(entry, ensure_ascii=False).encode() + b"\n")
    finally:
        os.close(descriptor)
