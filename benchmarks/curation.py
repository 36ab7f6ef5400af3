"""Speed of curation: seconds of film for a second of one core, stage by stage, and of what needs no decoding.

    python -m benchmarks.curation [seconds=30] [films=FILE,...] [write=true]

The films are made here, of 480p and 1080p (`data_speed.footage`, shots of five seconds joined by cuts); others may be
named too. CPU time of this process alone, which does the stages one after the other; start and imports aren't counted.
Scores are compared between a film and its copy at a lower quality.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.data_speed import footage
from benchmarks.report import command, write
from data_tools.curation import cut, look, probe, scores, shots
from data_tools.curation.clips import clips_of
from data_tools.curation.duplicates import Hashed, HashIndex
from data_tools.curation.rules import DEFAULT, Rule
from data_tools.curation.scores import COLUMNS
from data_tools.curation.stage import Item, Stage
from sora_train.core.cli import run
from sora_train.core.media import write_mp4
from sora_train.core.options import number, options

_SHOT_S, _FPS = 5, 30.0
_SIZES = {"480p": (480, 854), "1080p": (1080, 1920)}


@dataclass
class Options:
    """Options of the benchmark; see the head of this file."""

    seconds: int = number(30, least=10)
    films: str = ""
    write: bool = False


def main() -> int:
    """Measure, and print the tables."""
    o = options(Options, __doc__)
    with tempfile.TemporaryDirectory() as folder:
        rows, drift = _films(o, Path(folder))
    rows += [
        ["rule over 10,000 clips", f"{_rule_s():.3f} s", "", "", "", ""],
        ["nearest of 100,000 clips", f"{1000 * _query_s():.0f} ms", "", "", "", ""],
    ]
    header = ("film", "look", "shots and scores", "all scores, times real time", "cut", "all, seconds of CPU a minute")
    about = (
        f"`{command()}`. Seconds of film for a second of one core. Scores of the 480p film at CRF 18 and 32 differ by "
        f"{drift:.1%} at most in motion, luma and share of black."
    )
    if o.write:
        write("Curation of raw footage", about, header, rows)
    else:
        print(about, *(" | ".join(row) for row in (header, *rows)), sep="\n")
    return 0


def _films(o: Options, folder: Path) -> tuple[list[list[str]], float]:
    rows, drift = [], 0.0
    for name, (height, width) in _SIZES.items():
        path = _film(folder / f"{name}.mp4", height, width, o.seconds, 18)
        line, first = _measured(name, path, folder / name)
        rows.append(line)
        if name == "480p":
            again = _measured(name, _film(folder / "again.mp4", height, width, o.seconds, 32), folder / "again")[1]
            pairs = zip(first, again, strict=True)
            drift = max(abs(a[n] - b[n]) / max(a[n], 1e-9) for a, b in pairs for n in ("motion", "luma") if a[n])
    for file in filter(None, o.films.split(",")):
        rows.append(_measured(Path(file).name, Path(file), folder / Path(file).stem)[0])
    return rows, drift


def _film(path: Path, height: int, width: int, seconds: int, crf: int) -> Path:
    shots_of = (footage(seed, round(_SHOT_S * _FPS), height, width) for seed in range(seconds // _SHOT_S))
    write_mp4(path, chain.from_iterable(shots_of), _FPS, crf, 60)
    return path


def _measured(name: str, path: Path, work: Path) -> tuple[list[str], list[Item]]:
    """The row of a film, and its clips."""
    stat = path.stat()
    item: Item = {"id": name, "name": path.name, "path": str(path), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    item |= {"source": "", "licence": "", "rights": {}}
    spent = {}
    for stage in (probe.stage(64, {}), look.stage(3.0, {}), shots.stage(1, 20, 0.25, 64), scores.stage()):
        fields, spent[stage.name] = _done(stage, item, work)
        item |= fields
    clips = [clip for clip, outcome in clips_of([item]) if "kept" in outcome]
    cutting, cut_s = cut.stage(18, 24, None, 8), 0.0
    for clip in clips:
        cut_s += _done(cutting, clip, work)[1]
    of, judged = item["seconds"], spent["shots"] + spent["scores"]
    seen = spent["look"] + judged
    cells = [of / spent["look"], of / judged, of / seen, sum((c["end"] - c["start"]) / c["fps"] for c in clips) / cut_s]
    return [name, *(f"{cell:.1f}" for cell in cells), f"{60 * (sum(spent.values()) + cut_s) / of:.1f}"], clips


def _done(stage: Stage, item: Item, work: Path) -> tuple[Item, float]:
    folder = work / stage.name
    folder.mkdir(parents=True, exist_ok=True)
    return _timed(lambda: stage.work(stage.inputs(item), stage.parameters, folder))


def _timed(act: Callable[[], Any]) -> tuple[Any, float]:
    start = time.process_time()
    return act(), time.process_time() - start


def _rule_s() -> float:
    rng = np.random.default_rng(0)
    clips = [dict(zip(COLUMNS, values, strict=True)) for values in rng.uniform(0, 1, (10_000, len(COLUMNS))).tolist()]
    return _timed(lambda: Rule(DEFAULT).reasons(clips))[1]


def _query_s() -> float:
    rng, index = np.random.default_rng(0), HashIndex()
    for number_of in range(100_000):
        hashes = rng.integers(0, 2**64, 12, dtype=np.uint64)
        index.add(Hashed(str(number_of), hashes, hashes))
    asked = [Hashed("", *rng.integers(0, 2**64, (2, 12), dtype=np.uint64)) for _ in range(9)]
    return sorted(_timed(lambda one=one: index.nearest(one))[1] for one in asked)[4]


if __name__ == "__main__":
    run(main)
