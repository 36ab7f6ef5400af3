"""Red teaming: runs a set of prompts through prompt guard, model and output guard, and counts what got through.

A line of the set is {"id": "a1", "category": "violence", "prompt": "...", "expected": "block"}; `expected` is block or
allow. Videos are written into a folder that only its owner can read. The report has counts and rates with Wilson
intervals and no text of a prompt, so it can be published.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy.stats import binomtest

from sora_train.core.cli import InputError
from sora_train.core.options import MAX_SEED, number
from sora_train.core.outputs import usable
from sora_train.data.read.pool import Pool
from sora_train.evaluation.intervals import wilson
from sora_train.evaluation.results import write_json
from sora_train.generation.options import Job
from sora_train.generation.options import Options as SampleOptions
from sora_train.generation.output import save
from sora_train.generation.safeguards import Refused
from sora_train.generation.sampler import Sampler
from sora_train.generation.samples import check_prompt, made, made_with, prepared
from sora_train.operations.source import Source
from sora_train.release.chosen import safeguards_for
from sora_train.release.folder import append_line, find
from sora_train.release.verify import file_hash

RESULTS, REPORT = "results.jsonl", "report.json"
BY_PROMPT, BY_OUTPUT, MADE = "refused_prompt", "refused_video", "made"
_EXPECTED = ("block", "allow")
Try = Callable[["Case"], str]  # returns a case's outcome: refused_prompt, refused_video or made


@dataclass
class Options:
    """Options of `redteam`."""

    run_dir: str = ""
    prompts: str = ""
    out: str = ""
    seconds: float | None = number(None, above=0, most=600)
    steps: int | None = number(None, least=1, most=10_000)
    count: int | None = number(None, least=1, most=1_000_000)  # run only the first `count` prompts
    seed: int = number(0, least=0, most=MAX_SEED)
    release: str | None = None
    compare: list[str] = number([])


@dataclass(frozen=True)
class Case:
    """One prompt of the set."""

    id: str
    category: str
    prompt: str
    blocked: bool  # whether it is expected to be blocked


def main(o: Options) -> int:
    """Run a set of prompts, or compare two runs of it."""
    if o.compare:
        Console().print(compared([Path(folder) for folder in o.compare]))
        return 0
    missing = [name for name in ("run_dir", "prompts", "out") if not getattr(o, name)]
    if missing:
        raise InputError(f"missing: {', '.join(f'{name}=...' for name in missing)}")
    cases = read_cases(Path(o.prompts))[: o.count]
    out = Path(o.out)
    source = Source(SampleOptions(run_dir=o.run_dir, seconds=o.seconds, steps=o.steps, seed=o.seed))
    about = {"weights": source.weights, "guard": _guard_version(o.release), "prompts": file_hash(Path(o.prompts)),
             "seconds": o.seconds, "steps": o.steps, "seed": o.seed}  # fmt: skip
    with Pool.of(replace(source.config.data, workers=1)) as pool:
        results = attempt_all(cases, out, about, _through_the_model(source, o.release, out / "outputs", pool))
    report = report_of(cases, results, about)
    write_json(out / REPORT, report)
    Console().print(_table(report))
    print(f"{out / REPORT}: counts and rates without prompts; what was made lies in {out / 'outputs'}")
    return 0


def read_cases(path: Path) -> list[Case]:
    """Read the prompts of a file. Raises InputError that names the first invalid line."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        raise InputError(f"prompts={path} can't be read: {error}") from error
    cases = []
    for place, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            text = [row[key] for key in ("id", "category", "prompt", "expected")]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: line {place} must have id, category, prompt, expected ({error})") from error
        if not all(isinstance(one, str) for one in text) or text[3] not in _EXPECTED:
            raise InputError(f"{path}: line {place}: all four are text, and expected is block or allow")
        cases.append(Case(text[0], text[1], text[2], text[3] == "block"))
    if twice := [id for id, times in Counter(case.id for case in cases).items() if times > 1]:
        raise InputError(f"{path}: id {twice[0]} comes twice")
    if not cases:
        raise InputError(f"{path} holds no prompt")
    return cases


def attempt_all(cases: Sequence[Case], out: Path, about: Mapping[str, Any], attempt: Try) -> dict[str, str]:
    """Run every case and return its outcome by id; outcomes of an earlier, interrupted call are reused.

    `about` identifies the model, guard and prompt set; a folder has the results of one such combination only.

    Raises:
        InputError: The folder can't be used, or has results of another combination.
    """
    with usable(out, "out"):
        out.mkdir(parents=True, exist_ok=True)
        out.chmod(0o700)
    head = {"about": dict(about)}
    lines = _lines(out / RESULTS)
    if lines and lines[0] != head:
        raise InputError(f"{out} holds the results of another model, guard or set; give another out=")
    if not lines:
        append_line(out / RESULTS, head)
    results = {line["id"]: line["outcome"] for line in lines[1:]}
    for case in track([case for case in cases if case.id not in results], "prompts"):
        results[case.id] = outcome = attempt(case)
        append_line(
            out / RESULTS, {"id": case.id, "category": case.category, "blocked": case.blocked, "outcome": outcome}
        )
    return {case.id: results[case.id] for case in cases}


def report_of(cases: Sequence[Case], results: Mapping[str, str], about: Mapping[str, Any]) -> dict[str, Any]:
    """Counts and rates by category, without any text of a prompt."""
    categories = sorted({case.category for case in cases})
    rows = {name: _row([c for c in cases if c.category == name], results) for name in categories}
    return {"about": dict(about), "all": _row(cases, results), "categories": rows}


def compared(folders: Sequence[Path]) -> Table:
    """Compare two runs of the same set, case by case. Raises InputError if they have no prompt in common.

    The table has, by category, how many prompts each run alone handled as expected, and the p-value of the exact
    McNemar test.
    """
    if len(folders) != 2:
        raise InputError("compare=[FOLDER,FOLDER] takes two folders of redteam")
    runs = [{line["id"]: line for line in _lines(folder / RESULTS)[1:]} for folder in folders]
    both = sorted(set(runs[0]) & set(runs[1]))
    if not both:
        raise InputError(f"{folders[0]} and {folders[1]} have no prompt in common")
    table = Table(title=f"{len(both)} prompts: right by one alone (exact McNemar test)")
    for head in ("category", str(folders[0]), str(folders[1]), "p"):
        table.add_column(head)
    for name in ["all", *sorted({runs[0][id]["category"] for id in both})]:
        ids = [id for id in both if name in ("all", runs[0][id]["category"])]
        first, second = (sum(_right(a[id]) and not _right(b[id]) for id in ids) for a, b in (runs, runs[::-1]))
        p = binomtest(first, first + second).pvalue if first + second else 1.0
        table.add_row(name, str(first), str(second), f"{p:.3f}")
    return table


def _through_the_model(source: Source, named: str | None, folder: Path, pool: Pool) -> Try:
    """Build a function that samples a case's prompt. It loads the model when a prompt first passes the guard."""
    safeguards = safeguards_for(named)
    opened: list[Sampler] = []

    def attempt(case: Case) -> str:
        """Sample a case's prompt, and return the outcome."""
        o = replace(source.options, prompt=case.prompt)
        sample = prepared(source.config, o, Job(o, folder / case.id.replace("/", "_")), pool)
        try:
            check_prompt(source.world, sample, safeguards)
        except Refused:
            return BY_PROMPT
        if not opened:
            opened.append(source.open())
        about = sample.about(source.weights)
        about |= safeguards.about(about) | made_with(opened[0])
        try:
            save(sample.target, made(opened[0], sample), source.config.data.made_fps, about, safeguards)
        except Refused:
            return BY_OUTPUT
        return MADE

    return attempt


def _row(cases: Sequence[Case], results: Mapping[str, str]) -> dict[str, Any]:
    bad, good = [c for c in cases if c.blocked], [c for c in cases if not c.blocked]
    return {
        "prompts": len(cases),
        "blocked_before": _rate(sum(results[c.id] == BY_PROMPT for c in bad), len(bad)),
        "blocked_after": _rate(sum(results[c.id] == BY_OUTPUT for c in bad), len(bad)),
        "leaked": _rate(sum(results[c.id] == MADE for c in bad), len(bad)),
        "over_blocked": _rate(sum(results[c.id] != MADE for c in good), len(good)),
    }


def _rate(count: int, n: int) -> dict[str, Any]:
    low, high = wilson(count, n)
    return {"count": count, "n": n, "rate": count / n if n else None, "low": low, "high": high}


def _right(line: Mapping[str, Any]) -> bool:
    return bool(line["blocked"]) == (line["outcome"] != MADE)


def _table(report: Mapping[str, Any]) -> Table:
    table = Table(title="red team: shares with 95% intervals")
    names = ("blocked_before", "blocked_after", "leaked", "over_blocked")
    for head in ("category", "prompts", *(name.replace("_", " ") for name in names)):
        table.add_column(head)
    for category, row in [*report["categories"].items(), ("all", report["all"])]:
        cells = [
            f"{row[n]['rate']:.0%} ({row[n]['low']:.0%} to {row[n]['high']:.0%})" if row[n]["n"] else "-" for n in names
        ]
        table.add_row(category, str(row["prompts"]), *cells)
    return table


def _lines(path: Path) -> list[dict[str, Any]]:
    """Read the lines of the results; an incomplete last line, left by a kill, is removed from the file."""
    if not path.is_file():
        return []
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(path, whole)
    return [json.loads(line) for line in data[:whole].splitlines()]


def _guard_version(named: str | None) -> str:
    """Identity of a guard: its settings and its word list."""
    folder = find(named)
    if folder is None:
        return "none"
    s = folder.settings
    its = {name: value for name, value in vars(s).items() if name.startswith("guard")}
    words = file_hash(folder.file(s.guard_words))[:12] if s.guard_words else ""
    return json.dumps(its | {"words": words}, sort_keys=True)
