"""Computes the metrics of a folder of videos from any model, compared with real videos of the same file names."""

from __future__ import annotations

import csv
import ctypes
import io
import json
import os
import unicodedata
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from sora_train.core.cli import InputError
from sora_train.core.media import read_mp4
from sora_train.evaluation.metric import Sample
from sora_train.evaluation.outcome import Outcome, conclude
from sora_train.evaluation.results import REAL, SAMPLES, Judged, Judges

_MALLOC = {  # parameters of glibc's mallopt(3) and their values
    -8: 1,  # M_ARENA_MAX: threads share one heap, whose memory can be reused by any of them
    -3: 32 << 20,  # M_MMAP_THRESHOLD, the largest there is
    -2: 256 << 20,  # M_TOP_PAD: how much the heap grows at once
    -1: (1 << 31) - 1,  # M_TRIM_THRESHOLD: how much stays free before memory is returned
}
_VIDEOS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")
_NAMES = ("video", "name", "file_name", "file", "path")  # columns that may name a video; the first existing one counts
_CAPTIONS = ("prompt", "caption", "text")


def judge_folder(
    judges: Judges, videos: str, reference: str | None, prompts: str | None, named: Collection[str] = ()
) -> Outcome:
    """Compute metrics of every video of a folder.

    Videos of the same name in `reference` are compared in pairs. If no names agree, the reference is used as a set, for
    distances only. `named` are metrics that the user asked for by name.

    Raises:
        InputError: Only some names agree, no video can be read, or a named metric has nothing to compare with.
    """
    made, texts = videos_in(videos), read_prompts(prompts) if prompts else {}
    real = videos_in(reference) if reference else {}
    paired = bool(set(made) & set(real))
    for one in judges.metrics:
        if one.name in named and "real" in one.needs and not paired:
            lacks = f"reference={reference} has no video of the same name" if real else "give reference=DIR"
            raise InputError(f"metrics={one.name} compares each video with a real one: {lacks}")
    for distance in judges.distances:
        if distance.name in named and not real:
            raise InputError(f"metrics={distance.name} is a distance from real videos: give reference=DIR")
    for what, others in ((f"reference={reference}", real if paired else {}), (f"prompts={prompts}", texts)):
        missing = sorted(set(made) - set(others)) if others else []
        if missing:
            raise InputError(f"{what} has nothing for {len(missing)} of {len(made)} videos, the first is {missing[0]}")

    def judged(name: str, path: Path, beside: Path | None) -> Judged:
        frames, fps = read_video(path)
        truth = None if beside is None else read_video(beside)[0]
        return judges.judge(frames, truth, _sample(name, fps, texts))

    _reuse_memory()
    work = {SAMPLES: [(name, path, real[name] if paired else None) for name, path in made.items()]}
    if real:
        work[REAL] = [(name, path, None) for name, path in real.items()]
    columns: dict[str, list[Judged]] = {}
    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))  # most of the work is in libraries that release the GIL
    try:
        for column, tasks in work.items():
            found = pool.map(lambda task: judged(*task), tasks)
            columns[column] = list(track(found, total=len(tasks), description=f"judging {column}"))
    finally:
        pool.shutdown(cancel_futures=True)
    about = {"folder": videos, "reference": reference, "prompts": prompts}
    return conclude(f"{videos}, {len(made)} videos", about, judges, columns)


def _reuse_memory() -> None:
    """Configure glibc, for this process, to keep freed memory for the next video instead of returning it to the system.

    By default glibc maps new memory for arrays as large as a video; the page faults took a quarter of the CPU time for
    64 clips of 480p. Other C libraries are not changed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in _MALLOC.items():
            mallopt(parameter, value)


def videos_in(folder: str) -> dict[str, Path]:
    """Find the videos of a folder and its subfolders, by their relative path without the ending.

    Hidden files and folders are skipped. Raises InputError if there are none.
    """
    top = Path(folder)
    if not top.is_dir():
        raise InputError(f"there is no folder {folder}")
    found = sorted(path for path in top.rglob("*") if path.suffix.lower() in _VIDEOS and path.is_file())
    found = [path for path in found if not any(part.startswith(".") for part in path.relative_to(top).parts)]
    names = {_shown(path.relative_to(top).with_suffix("").as_posix()): path for path in found}
    if not names:
        raise InputError(f"{folder} holds no videos ({' '.join(_VIDEOS)})")
    if len(names) < len(found):
        raise InputError(f"{folder} holds two videos of one name that differ in their endings alone")
    return names


def read_video(path: Path) -> tuple[np.ndarray, float]:
    """Read a video: frames `(T, H, W, 3)` uint8, and frames per second. Raises InputError if it can't be read."""
    try:
        return read_mp4(path)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error


def read_prompts(file: str) -> dict[str, dict[str, Any]]:
    """Read the prompt and further fields of each video; returns them by the video's name without the ending.

    The prompt is in the field `caption`.

    Files: .jsonl and .csv with a column `video` (or name, file_name, file, path) and `prompt` (or caption, text); .json
    with a list of the same or an object from name to prompt; .txt with lines of name, tab, prompt.
    """
    path = Path(file)
    if not path.is_file():
        raise InputError(f"there is no file {file}")
    try:
        rows = _rows(path)
    except (ValueError, csv.Error) as error:
        raise InputError(f"{file}: {error}") from error
    found: dict[str, dict[str, Any]] = {}
    for number, row in enumerate(rows, 1):
        name, caption = (next((row[key] for key in keys if key in row), None) for keys in (_NAMES, _CAPTIONS))
        if not isinstance(name, str) or not isinstance(caption, str):
            raise InputError(f"{file}: entry {number} needs `video` and `prompt`, and both are texts")
        name = _shown(name)
        short = name[: -len(Path(name).suffix)] if Path(name).suffix.lower() in _VIDEOS else name
        if short in found:
            raise InputError(f"{file}: {short} stands there twice")
        found[short] = {**row, "caption": caption}
    if not found:
        raise InputError(f"{file} holds no prompts")
    return found


def _shown(name: str) -> str:
    """Normalise a name to Unicode's composed form (NFC), as some systems store accents separately from letters."""
    return unicodedata.normalize("NFC", name)


def _rows(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    elif path.suffix == ".json":
        content = json.loads(text)
        rows = [{"video": k, "prompt": v} for k, v in content.items()] if isinstance(content, dict) else content
    elif path.suffix == ".csv":
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
    else:
        rows = [dict(zip(("video", "prompt"), line.split("\t", 1), strict=False)) for line in text.split("\n") if line]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("needs an object for each video")
    return rows


def _sample(name: str, fps: float, texts: Mapping[str, dict[str, Any]]) -> Sample:
    row = texts.get(name, {})
    return Sample(name, row.get("caption", ""), fps, {k: v for k, v in row.items() if k != "caption"})
