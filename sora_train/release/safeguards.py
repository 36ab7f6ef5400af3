"""The safeguards of a release folder: they check prompts and frames, and mark, verify and sign videos."""

from __future__ import annotations

import datetime
import hashlib
import hmac
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from sora_train.core.cli import InputError
from sora_train.generation.options import FILES
from sora_train.generation.safeguards import Refused, Safeguards, Write
from sora_train.generation.video import Video
from sora_train.release.folder import ReleaseFolder
from sora_train.release.frames import read_frames
from sora_train.release.guard import Guard, guard_of
from sora_train.release.mark import BITS
from sora_train.release.marked import attempts
from sora_train.release.marks import Mark, mark_of
from sora_train.release.provenance import Signing, can_sign
from sora_train.release.verdict import Verdict

REFUSALS, MARKS = "refusals.jsonl", "marks.jsonl"  # records in the release folder


class Released(Safeguards):
    """The safeguards that a release folder's settings ask for."""

    def __init__(self, folder: ReleaseFolder, *, sign: bool = True, mark: bool = True, guard: bool = True) -> None:
        """Load keys, certificate and guards. Raises InputError for one that can't be used."""
        s = folder.settings
        self.folder = folder
        self._secret = folder.mark_key()
        self._signing = Signing(folder) if sign and s.sign else None
        self._mark: Mark | None = mark_of(folder) if mark else None
        self.guard: Guard | None = guard_of(folder) if guard and s.guard else None

    def check_format(self, format: str) -> None:
        """Raise InputError for a format that can't contain a manifest."""
        if self._signing is not None and not can_sign(f".{format}"):
            raise InputError(f"format={format} can't hold a signed manifest; take mp4, or give release.sign=false")

    def check_prompt(self, texts: Sequence[str], given: Sequence[np.ndarray]) -> None:
        """Check captions and given pictures. Raises Refused."""
        if self.guard is None:
            return
        text = "\n".join(texts)
        verdict = self.guard.texts(texts)
        for frames_THWC in given:
            verdict = verdict or self.guard.frames(frames_THWC)
        if verdict is not None:
            raise self._refusal("prompt", verdict, text)

    def about(self, about: Mapping[str, Any]) -> dict[str, Any]:
        """Entry for a sample's JSON: whether it is signed and guarded, and the id and kind of its mark."""
        mark = {} if self._mark is None else {"mark": self._id(about), "mark_kind": self._mark.name}
        return {"release": {"signed": self._signing is not None, "guarded": self.guard is not None, **mark}}

    def write(self, path: Path, video: Video, write: Write, about: Mapping[str, Any]) -> None:
        """Check a video, mark it, write it with `write`, and sign the file. Raises Refused.

        A signed file appears at `path` only when it is complete.
        """
        draft = (
            path if self._signing is None else path.with_name(f".{path.stem[-180:]}.{os.getpid()}.draft{path.suffix}")
        )
        try:
            claims = self._write_marked(draft, video, write, about)
            if self._signing is not None:
                given = [Path(about["options"][name]) for name in about.get("given", {}) if name in FILES]
                self._signing.sign(draft, path, claims, given)
        finally:
            if draft != path:
                draft.unlink(missing_ok=True)

    def sign(self, path: Path, about: Mapping[str, Any]) -> None:
        """Sign a picture in place."""
        if self._signing is not None:
            self._signing.sign(path, path, self._claims(about))

    def prompt_hash(self, text: str) -> str:
        """Keyed hash (HMAC) of a prompt: only the owner of the key can tell whether it is that of a given text."""
        return hmac.new(self._secret, text.encode(), "sha256").hexdigest()[:32]

    def _write_marked(self, draft: Path, video: Video, write: Write, about: Mapping[str, Any]) -> dict[str, Any]:
        """Write the draft, with a stronger mark until it is detected in the file. Returns the manifest's claims."""
        mark, claims, guarded = self._mark, self._claims(about), self._guarded(video, about)
        if mark is None:
            write(draft, guarded)
            return claims
        id, held = self._id(about), False
        for marked in attempts(mark, guarded, id):
            write(draft, marked)
            held = mark.found(read_frames(draft)).is_that(id)
            if held:
                break
        claims["mark"] = {"id": id, "kind": mark.name, "held": held}
        if not held:
            small = "the video is too small or too short for it"
            print(f"warning: {draft.parent}: the mark was not found again: {small}", file=sys.stderr, flush=True)
        self.folder.append(MARKS, {"mark": id, "held": held, "file": str(about.get("file", "")), "time": _now()})
        return claims

    def _guarded(self, video: Video, about: Mapping[str, Any]) -> Video:
        """Return the video, whose frames are checked at once, or as its pieces are read. Raises Refused."""
        if self.guard is None or not self.guard.sees:
            return video
        if isinstance(video, np.ndarray):
            self._check_frames(video, about)
            return video
        return self._checked(video, about)

    def _checked(self, pieces: Iterable[np.ndarray], about: Mapping[str, Any]) -> Iterator[np.ndarray]:
        for piece in pieces:
            self._check_frames(piece, about)
            yield piece

    def _check_frames(self, frames_THWC: np.ndarray, about: Mapping[str, Any]) -> None:
        assert self.guard is not None
        verdict = self.guard.frames(frames_THWC)
        if verdict is not None:
            raise self._refusal("video", verdict, _prompt(about))

    def _refusal(self, what: str, verdict: Verdict, text: str) -> Refused:
        """Record a refusal, without the text, and return it as an exception."""
        known = self.prompt_hash(text)
        entry = {"time": _now(), "what": what, "category": verdict.category, "by": verdict.by, "prompt_hash": known}
        self.folder.append(REFUSALS, entry | {"score": verdict.score})
        return Refused(f"the {what} is refused ({verdict.category}, by {verdict.by})", verdict.category)

    def _claims(self, about: Mapping[str, Any]) -> dict[str, Any]:
        options = about.get("options", {})
        return {
            "model": str(about.get("weights", "")), "run": Path(str(options.get("run_dir", ""))).name,
            "seed": about.get("seed", 0), "time": _now(), "prompt_hash": self.prompt_hash(_prompt(about)),
            "version": _version(), "contact": self.folder.settings.contact,
            "given": dict(about.get("given", {})),
        }  # fmt: skip

    def _id(self, about: Mapping[str, Any]) -> str:
        """Id of a sample's mark, 12 hexadecimal digits: a keyed hash of options, weights, inputs, seed, prompt."""
        what = {key: about[key] for key in sorted(about) if key in ("options", "weights", "given", "seed", "prompt")}
        text = json.dumps(what, sort_keys=True, default=str).encode()
        return hmac.new(self._secret, text, hashlib.sha256).hexdigest()[: BITS // 4]


def _prompt(about: Mapping[str, Any]) -> str:
    return str(about.get("prompt") or about.get("options", {}).get("shots") or "")


@cache
def _version() -> str:
    """The package's version, which takes milliseconds to look up."""
    return version("sora_train")


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
