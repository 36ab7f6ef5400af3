"""Files of a sample: the video in one of several formats, a contact sheet, and a JSON file with its options.

The JSON file is written last; if it exists, the sample is complete.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from sora_train.core.cli import InputError
from sora_train.core.media import contact_sheet, write_gif, write_mp4, write_png, write_webm
from sora_train.generation.safeguards import NO_SAFEGUARDS, Safeguards
from sora_train.generation.video import Video, pieces_of

FORMATS = ("mp4", "webm", "gif", "frames", "png")  # frames: a folder of PNG files; png: of a clip of one frame
_OTHERS = (".avi", ".mov", ".mkv", ".m4v", ".ts", ".mpg", ".wmv", ".flv", ".webp", ".jpg", ".jpeg", ".bmp", ".tif")
_COMMENT = "AI-generated video (sora_train)"
_CRF = {"mp4": 18, "webm": 24}
_MOST_CRF = {"mp4": 51, "webm": 63}


@dataclass(frozen=True)
class Target:
    """Target of a sample: FOLDER/NAME with the suffix of its format."""

    folder: Path
    name: str
    format: str = "mp4"
    crf: int | None = None

    @property
    def path(self) -> Path:
        """The video, or the folder of its frames."""
        return self.folder / (self.name if self.format == "frames" else f"{self.name}.{self.format}")

    @property
    def json(self) -> Path:
        """The JSON file with the settings that the sample was made from."""
        return self.folder / f"{self.name}.json"

    @property
    def sheet(self) -> Path:
        """The contact sheet."""
        return self.folder / f"{self.name}-sheet.png"


def has_format(place: str | Path) -> bool:
    """Tell whether the suffix of a name is one of a format."""
    return Path(place).suffix.lower().removeprefix(".") in set(FORMATS) - {"frames"}


def target_of(place: Path, wanted: str | None, frames: int, crf: int | None) -> Target:
    """Combine `out=` and `format=` to a target. An unknown suffix is part of the name.

    Args:
        place: Path of the sample, with or without suffix.
        wanted: Format, one of `FORMATS`; None: that of the suffix, else mp4.
        frames: Frames of the clip. A single one is written as PNG instead of mp4 or webm.
        crf: Quality of mp4 or webm; None: the default.

    Raises:
        InputError: The options contradict each other.
    """
    suffix = place.suffix.lower().removeprefix(".")
    has_suffix = has_format(place)
    if place.suffix.lower() in _OTHERS:
        raise InputError(f"out={place}: samples are .mp4, .webm, .gif, .png (one frame), or a folder of format=frames")
    if has_suffix and wanted not in (None, suffix):
        raise InputError(f"out={place} and format={wanted} differ; leave one of them out")
    name = place.stem if has_suffix else place.name
    chosen = wanted or (suffix if has_suffix else "mp4")
    if frames == 1 and chosen in ("mp4", "webm"):
        chosen = "png"
    if frames > 1 and chosen == "png":
        raise InputError(f"a PNG holds one frame, and {place} has {frames}; give format=frames, or a shorter seconds=")
    if crf is not None and crf > _MOST_CRF.get(chosen, -1):
        most = _MOST_CRF.get(chosen)
        raise InputError(f"crf={crf}: " + (f"at most {most} for {chosen}" if most else f"{chosen} has no crf"))
    if not name or place.is_dir() and chosen != "frames":
        raise InputError(f"out={place} is a folder; name a file in it, e.g. {place / 'clip.mp4'}")
    return Target(place.parent, name, chosen, crf)


def save_sample(
    folder: Path, name: str, video: Video, fps: float, about: Mapping[str, object],
    safeguards: Safeguards = NO_SAFEGUARDS,
) -> Path:  # fmt: skip
    """Write NAME.mp4 (NAME.png for one frame), NAME-sheet.png and NAME.json to a folder; returns the video's path."""
    single = isinstance(video, np.ndarray) and len(video) == 1
    return save(Target(folder, name, "png" if single else "mp4"), video, fps, about, safeguards)


def save(
    target: Target, video: Video, fps: float, about: Mapping[str, object], safeguards: Safeguards = NO_SAFEGUARDS
) -> Path:
    """Write a sample's video, contact sheet and JSON; returns the video's path.

    Args:
        target: Folder, name and format of the files.
        video: Frames `(T, H, W, 3)` uint8, or an iterable of arrays of frames. Of an iterable, the contact sheet shows
            the first frames of a few evenly spaced arrays.
        fps: Frames per second.
        about: Contents of the JSON, which is written last.
        safeguards: Guard, mark and signature of the video.

    Raises:
        InputError: A file can't be written.
        Refused: The safeguards refuse the video.
    """
    try:
        target.folder.mkdir(parents=True, exist_ok=True)
        target.json.unlink(missing_ok=True)
        firsts: list[np.ndarray] = []
        watched = video if isinstance(video, np.ndarray) else _watched(video, firsts)
        safeguards.write(target.path, watched, lambda path, its: _write(path, target, its, fps), about)
        shown = video if isinstance(video, np.ndarray) else np.stack(firsts)
        scale = max(1, round(128 / shown.shape[1]))
        sheet = contact_sheet(shown, columns=min(8, len(shown)), scale=scale)
        write_png(target.sheet, sheet)
        safeguards.sign(target.sheet, about)
        temporary = target.json.with_name(f".{target.name[-200:]}.json.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")
        temporary.replace(target.json)
    except OSError as error:
        raise InputError(f"{target.path} can't be written: {error.strerror or error}") from error
    return target.path


def is_there(target: Target, about: Mapping[str, Any]) -> bool:
    """Tell whether the same sample exists already: its video, and a JSON file with the same contents."""
    try:
        found = json.loads(target.json.read_bytes())
    except (OSError, ValueError):
        return False
    return target.path.exists() and isinstance(found, dict) and all(found.get(k) == v for k, v in about.items())


def _write(path: Path, target: Target, video: Video, fps: float) -> None:
    crf = target.crf if target.crf is not None else _CRF.get(target.format, 0)
    if target.format == "mp4":
        write_mp4(path, video, fps, crf, metadata={"comment": _COMMENT})
    elif target.format == "webm":
        write_webm(path, video, fps, crf, metadata={"comment": _COMMENT})
    elif target.format == "gif":
        write_gif(path, video, fps, _COMMENT)
    elif target.format == "png":
        write_png(path, next(_frames(video)))
    else:
        _write_frames(path, video)


def _write_frames(folder: Path, video: Video) -> None:
    """Write a PNG for each frame. The folder appears when it is complete; it replaces an earlier folder of frames."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        for number, frame in enumerate(_frames(video)):
            write_png(temporary / f"{number:05d}.png", frame)
        if folder.exists():
            if strange := [
                path.name for path in folder.iterdir() if not (path.stem.isdigit() and path.suffix == ".png")
            ]:
                raise InputError(f"{folder} holds {strange[0]}, which is no frame of a sample; choose another out=")
            shutil.rmtree(folder)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _frames(video: Video) -> Iterator[np.ndarray]:
    return chain.from_iterable(pieces_of(video))


def _watched(pieces: Iterable[np.ndarray], firsts: list[np.ndarray]) -> Iterator[np.ndarray]:
    """Iterate over pieces, and collect in `firsts` the first frames of fewer than 16 evenly spaced ones."""
    every = 1
    for number, piece in enumerate(pieces):
        if number % every == 0:
            firsts.append(piece[0])
            if len(firsts) == 16:
                del firsts[1::2]
                every *= 2
        yield piece
