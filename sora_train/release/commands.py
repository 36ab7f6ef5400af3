"""Commands of `sora_train.release` that need no model: init, sign, verify."""

from __future__ import annotations

import datetime
import os
import shutil
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from sora_train.core.cli import InputError
from sora_train.core.options import choice
from sora_train.release.certificates import make_authority
from sora_train.release.folder import ReleaseFolder, Settings, default_path, find, make
from sora_train.release.provenance import Signing, can_sign, read_manifest
from sora_train.release.verify import file_hash, verify

_EXPLAINED = """{path}
  release.json  what is done to every video, and the guards; edit it at will
  words.txt     the word list of the guard: a floor to be made longer
  root.pem      give this to those who should be able to verify: `verify video=FILE trust=root.pem`
  chain.pem, sign.key   sign manifests. Programs that don't know root.pem show the signature as intact and not trusted;
                a certificate from a list that they know takes its place with certificate=, key= and trust=
  mark.key      finds marks, and could remove them: keep it secret, and keep it: without it no mark is found
From now on `sample`, `evaluate` and the service sign, and `sample` and the service mark and guard, until release=off.
"""


@dataclass
class Init:
    """Options of `init`."""

    provider: str  # who is responsible for the videos
    release: str | None = None  # the folder to make
    system: str = "sora_train"
    contact: str = ""
    certificate: str | None = None  # your own signing certificate and its intermediates, PEM
    key: str | None = None  # its private key
    trust: str | None = None  # the root certificate of its chain
    algorithm: str = choice(("es256", "es384", "ps256", "ed25519"), "es256")
    timestamps: str = ""  # URL of a time-stamping authority
    mark: str = "classical"  # classical, none, or a VideoSeal TorchScript file
    words: str | None = None  # another word list


@dataclass
class Sign:
    """Options of `sign`."""

    video: str
    out: str
    generator: str  # the program or model that made it
    release: str | None = None


@dataclass
class Verify:
    """Options of `verify`."""

    video: str
    trust: str | None = None  # root certificates in place of the folder's
    release: str | None = None


def init(o: Init) -> int:
    """Make the release folder."""
    own = (o.certificate, o.key, o.trust)
    if any(own) and not all(own):
        raise InputError("certificate=, key= and trust= go together: the chain, its key and the root it leads to")
    path = default_path() if o.release is None else Path(o.release)
    settings = Settings(
        o.provider, o.system, o.contact, mark=_whole(o.mark), algorithm=o.algorithm, timestamps=o.timestamps
    )
    if o.certificate and o.key and o.trust:
        settings.certificate, settings.key, settings.trust = (
            str(Path(one).absolute()) for one in (o.certificate, o.key, o.trust)
        )
    words = Path(__file__).with_name("words.txt") if o.words is None else Path(o.words)
    if not words.is_file():
        raise InputError(f"there is no words={words}")

    def fill(folder: Path) -> None:
        if not o.certificate:
            make_authority(folder, o.provider)
        shutil.copyfile(words, folder / "words.txt")

    folder = make(path, settings, fill)
    try:
        Signing(folder)  # fails now rather than at the first video
    except InputError:
        folder.discard()
        raise
    print(_EXPLAINED.format(path=path), end="")
    return 0


def sign(o: Sign) -> int:
    """Sign a video or picture that was made elsewhere."""
    source, target = Path(o.video), Path(o.out)
    if not source.is_file():
        raise InputError(f"there is no file {source}")
    if not can_sign(target.suffix) or source.suffix.lower() != target.suffix.lower():
        raise InputError(
            f"out={o.out} must end as {source} does, and be a kind that holds manifests (mp4, mov, png ...)"
        )
    draft = target.with_name(f".{target.name}.{os.getpid()}.draft{target.suffix}")
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    claims = {"model": o.generator, "time": now, "version": version("sora_train"), "source_sha256": file_hash(source)}
    try:
        shutil.copyfile(source, draft)
        earlier = [source] if read_manifest(source) is not None else []  # as an ingredient its manifest is kept
        Signing(_folder(o.release)).sign(draft, target, claims, earlier)
    except OSError as error:
        raise InputError(f"{target} can't be written: {error.strerror or error}") from error
    finally:
        draft.unlink(missing_ok=True)
    print(target)
    return 0


def check(o: Verify) -> int:
    """Print whether a file's manifest and mark are valid; returns 1 if neither is."""
    found = verify(Path(o.video), find(o.release), o.trust)
    print("\n".join(found.lines()))
    return 0 if found.holds else 1


def _folder(named: str | None) -> ReleaseFolder:
    folder = find(named)
    if folder is None:
        raise InputError("there is no release folder; python -m sora_train.release init provider=NAME makes one")
    return folder


def _whole(mark: str) -> str:
    return mark if mark in ("classical", "none") else str(Path(mark).absolute())
