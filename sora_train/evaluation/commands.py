"""The options of `sora_train.evaluate`, and those of its commands that need no model."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import track

from sora_train.core.cli import InputError
from sora_train.core.media import write_mp4
from sora_train.core.options import MAX_SEED, number
from sora_train.core.outputs import usable
from sora_train.demo_world.binding import FPS, trials
from sora_train.demo_world.render import render
from sora_train.evaluation import votes
from sora_train.evaluation.folder import judge_folder, videos_in
from sora_train.evaluation.layouts import case_collisions, check_layout, wanted
from sora_train.evaluation.page import evaluation_page
from sora_train.evaluation.registry import choose
from sora_train.evaluation.results import Judges, write_json

_SHOWN = 40  # printed faults of a folder


@dataclass
class Options:
    """Command-line options; the docstring of `evaluate.py` tells which can be combined."""

    run_dir: str = ""
    split: str = "val"
    shards: list[str] = field(default_factory=list)  # instead of the split's
    tasks: list[str] = field(default_factory=list)
    videos: str = ""
    reference: str | None = None
    prompts: str = ""
    metrics: list[str] = field(default_factory=list)  # names and groups; empty: quick, or completion with tasks
    models: dict[str, str] = field(default_factory=dict)  # local networks by the name that metrics give them
    count: int = number(256, least=1)
    seed: int = number(0, least=0, most=MAX_SEED)
    out: str = ""
    format: str = ""
    seconds: float | None = number(None, above=0)  # of the videos of a format
    images: str | None = None  # folder of first frames for a format
    binding: str = ""
    each: int = number(8, least=1)  # trials of a category and degree
    side_by_side: list[str] = field(default_factory=list)
    repeats: float = number(0.1, least=0, most=1)  # share of the pairs of `side_by_side` that are asked twice
    votes: list[str] = field(default_factory=list)
    key: str = ""
    memorised: list[str] = field(default_factory=list)
    release: str | None = None  # the release folder that signs the samples, or off
    vae: str | None = None  # new path of the run's VAE, if it has been moved
    base: str | None = None  # new path of the released weights that the run was trained from, if they have been moved

    def judges(self) -> Judges:
        """The requested metrics and distances."""
        return choose(self.metrics or ["completion" if self.tasks else "quick"], self.models)

    def path(self, ending: str) -> Path:
        """Path of `out`, whose folder is created. Raises InputError for another suffix or if it can't be written."""
        if not self.out.endswith(ending):
            raise InputError(f"out={self.out or '...'} must end in {ending}")
        path = Path(self.out)
        with usable(path, "out"):
            path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            raise InputError(f"out={path} can't be written: it is a folder, or in one that you may not write to")
        return path


def judge_videos(o: Options) -> int:
    """Compute the metrics of a folder of videos; prints them, writes a JSON file and a page. Returns the exit code."""
    if not o.videos:
        raise InputError("name what to evaluate: run_dir=RUN, or videos=DIR; --help shows more")
    out, judges = o.path(".json"), o.judges()
    outcome = judge_folder(judges, o.videos, o.reference, o.prompts or None, o.metrics)
    outcome.show(Console())
    with usable(out, "out"):
        write_json(out, outcome.as_json())
        out.with_suffix(".html").write_text(evaluation_page(outcome, videos_in(o.videos)), encoding="utf-8")
    print(f"{out}, {out.with_suffix('.html')}")
    return 0


def check_format(o: Options) -> int:
    """Check a folder of a benchmark's videos and print its faults. Returns the exit code, 1 if there are any."""
    every = wanted(o.format, o.prompts)
    wrong = check_layout(o.format, o.videos, every)
    for line in [*wrong[:_SHOWN], *([f"and {len(wrong) - _SHOWN} more"] if len(wrong) > _SHOWN else [])]:
        print(line)
    collisions = case_collisions(every)
    if collisions:
        print(f"{len(collisions)} names differ in capitals alone, the first is {collisions[0]}: not for every disk")
    print(f"{o.videos}: {len(every)} videos of {o.format}, {len(wrong)} thing(s) wrong")
    return 1 if wrong else 0


def write_binding(o: Options) -> int:
    """Write BindingBench: `prompts.jsonl`, and a correct video of every prompt under `reference/`."""
    top = Path(o.binding)
    with usable(top, "binding"):
        (top / "reference").mkdir(parents=True, exist_ok=True)
    every = list(trials(o.each, o.seed))
    for trial in track(every, description="drawing right videos"):
        write_mp4(top / "reference" / f"{trial.name}.mp4", render(trial.scene), FPS)
    lines = [json.dumps(trial.row()) for trial in every]
    (top / "prompts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{top / 'prompts.jsonl'}: {len(every)} prompts; right videos in {top / 'reference'}")
    return 0


def ask_people(o: Options) -> int:
    """Write the page for blind votes on `side_by_side`, and its key. Returns the exit code."""
    pairs = votes.pairs_of(o.side_by_side, o.prompts or None, o.count, o.seed, o.repeats)
    votes.write_votes_page(pairs, o.path(".html"))
    print(f"{o.out}: {len(pairs)} questions; {o.path('.html').with_suffix('.key.json')} says who is who")
    return 0


def count_votes(o: Options) -> int:
    """Compute and print the strengths of models from files of votes. Returns the exit code."""
    if not o.key:
        raise InputError("votes need key=PAGE.key.json, which was written beside the page")
    found, repeats = votes.read_votes(o.key, o.votes)
    strengths = votes.strengths(found)
    Console().print(votes.strengths_table(strengths, repeats))
    if o.out:
        write_json(o.path(".json"), votes.as_json(strengths, repeats))
    return 0


WITHOUT_A_MODEL: dict[str, Callable[[Options], int]] = {  # by the option that requests the command
    "binding": write_binding,
    "side_by_side": ask_people,
    "votes": count_votes,
    "format": check_format,
    "": judge_videos,
}
