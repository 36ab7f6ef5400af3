"""Folder layouts of external benchmarks: which videos from which prompts, under which names, how long.

The benchmarks themselves run in separate environments and are not part of this project. Their code is under Apache 2.0;
VBench's metrics include AMT and CoTracker (CC BY-NC), VBench-2.0's include mmyolo (GPL-3).

| format | prompts=FILE | videos |
| --- | --- | --- |
| vbench | lines of `all_dimension.txt`, or `VBench_full_info.json` | `PROMPT-0.mp4` to `-4`; temporal flickering, which only the JSON names, to `-24` |
| vbench_long | the same | the same, of 5 s or more |
| vbench2 | `VBench2_full_info.json`, or a folder of `DIMENSION.txt` | `DIMENSION/PROMPT-0.mp4` to `-2` (Diversity to `-19`), of the prompt 180 characters |
| physics_iq | `descriptions*.csv` | one of each `take-1`, by `generated_video_name`, of exactly 5 s |
"""  # noqa: E501  (a table)

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import av

from sora_train.core.cli import InputError, nearest

FORMATS = ("vbench", "vbench_long", "vbench2", "physics_iq")
PHYSICS_SECONDS, _LONG_SECONDS = 5.0, 5.0
_PHYSICS_COUNT, _TOLERANCE = 198, 0.001
_LONGEST_NAME = 255  # bytes of a file's name on the usual file systems


@dataclass(frozen=True)
class Wanted:
    """One video of a benchmark: its file below the folder, and its prompt."""

    file: str
    prompt: str


def wanted(form: str, prompts: str) -> list[Wanted]:
    """List the videos of a benchmark.

    Args:
        form: Name of the benchmark's format, one of `FORMATS`.
        prompts: Path of the benchmark's file or folder of prompts.

    Raises:
        InputError: The format is unknown, or the prompts can't be read or used as file names.
    """
    if form not in FORMATS:
        raise InputError(f"format={form}; {nearest(form, list(FORMATS))}")
    path = Path(prompts)
    if not path.exists():
        raise InputError(f"there is no {prompts}; prompts=... names the benchmark's own file of prompts")
    try:
        found = {"vbench2": _vbench2, "physics_iq": _physics_iq}.get(form, _vbench)(path)
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise InputError(f"prompts={prompts} are not those of {form}: {type(error).__name__}: {error}") from error
    if not found:
        raise InputError(f"prompts={prompts} hold no prompt of {form}")
    for one in found:
        name = Path(one.file).name
        if one.file.count("/") > (form == "vbench2") or "\0" in name or len(name.encode()) > _LONGEST_NAME:
            raise InputError(f"prompts={prompts}: no file can be named {one.file!r}")
    twice = [file for file, count in Counter(one.file for one in found).items() if count > 1]
    if twice:
        raise InputError(f"prompts={prompts}: two prompts want the file {twice[0]!r}")
    return found


def _vbench(path: Path) -> list[Wanted]:
    counts: dict[str, int] = {}
    if path.suffix == ".json":
        for entry in json.loads(path.read_text(encoding="utf-8")):
            many = 25 if "temporal_flickering" in entry["dimension"] else 5
            counts[entry["prompt_en"]] = max(many, counts.get(entry["prompt_en"], 0))
    else:
        counts = dict.fromkeys(_lines(path), 5)
    return [Wanted(f"{prompt}-{n}.mp4", prompt) for prompt, count in counts.items() for n in range(count)]


def _vbench2(path: Path) -> list[Wanted]:
    pairs: dict[tuple[str, str], None] = {}
    if path.is_dir():
        pairs = {(file.stem, prompt): None for file in sorted(path.glob("*.txt")) for prompt in _lines(file)}
    else:
        for entry in json.loads(path.read_text(encoding="utf-8")):
            dimensions = entry["dimension"] if isinstance(entry["dimension"], list) else [entry["dimension"]]
            pairs |= {(dimension.replace(" ", "_"), entry["prompt_en"]): None for dimension in dimensions}
    return [
        Wanted(f"{dimension}/{prompt[:180]}-{n}.mp4", prompt)
        for dimension, prompt in pairs
        for n in range(20 if dimension == "Diversity" else 3)
    ]


def _physics_iq(path: Path) -> list[Wanted]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = [row for row in csv.DictReader(file) if "take-1" in row["scenario"]]
    return [Wanted(row["generated_video_name"], row["description"]) for row in rows]


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]


def check_layout(form: str, folder: str, every: Sequence[Wanted]) -> list[str]:
    """Check a folder of a benchmark's videos; returns a line for each fault, none if it can be submitted.

    Args:
        form: Name of the benchmark's format, one of `FORMATS`.
        folder: Path of the folder.
        every: The videos that the benchmark requires.
    """
    top = Path(folder)
    if not top.is_dir():
        raise InputError(f"there is no folder {folder}")
    there = {path.relative_to(top).as_posix() for path in top.rglob("*.mp4")}
    names = {one.file for one in every}
    wrong = [f"missing: {name}" for name in sorted(names - there)]
    wrong += [f"not asked for: {name}" for name in sorted(there - names)]
    if form == "physics_iq" and len(every) != _PHYSICS_COUNT:
        wrong.append(f"Physics-IQ has {_PHYSICS_COUNT} videos, the prompts name {len(every)}")
    if form == "physics_iq":
        wrong += [f"does not begin with four digits: {n}" for n in sorted(names) if not n[:4].isdigit()]
    rates = set()
    for name in sorted(names & there):
        try:
            seconds, fps = _length(top / name)
        except (av.error.FFmpegError, ValueError, IndexError) as error:
            wrong.append(f"can't be read: {name}: {error}")
            continue
        rates.add(round(fps, 3))
        if form == "physics_iq" and abs(seconds - PHYSICS_SECONDS) > _TOLERANCE:
            wrong.append(f"{seconds:.3f} s instead of 5.000: {name}")
        if form == "vbench_long" and seconds < _LONG_SECONDS - _TOLERANCE:
            wrong.append(f"{seconds:.3f} s, VBench-Long is for 5 s and more: {name}")
    if form == "physics_iq" and len(rates) > 1:
        wrong.append(f"frame rates differ: {', '.join(f'{rate:g}' for rate in sorted(rates))}")
    return wrong


def case_collisions(every: Sequence[Wanted]) -> list[str]:
    """List the names that differ from another only in case: these files overwrite each other on macOS and Windows."""
    folded = Counter(one.file.casefold() for one in every)
    return [one.file for one in every if folded[one.file.casefold()] > 1]


def _length(path: Path) -> tuple[float, float]:
    """Duration in seconds and frames per second of a video, from the number of its packets.

    Raises ValueError if it has no frames or no frame rate.
    """
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        count = sum(packet.size > 0 for packet in container.demux(stream))
        rate = stream.average_rate
        if not count or rate is None:
            raise ValueError("no frames, or no frame rate")
        return float(count / rate), float(rate)
