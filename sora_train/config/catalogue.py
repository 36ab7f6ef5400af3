"""Catalogue of conf/, read from the comment at the head of each file; for `--help` and the generated reference.

An experiment file begins with

    # @package _global_
    # PURPOSE, a sentence.
    #   command:  the command that starts it
    #   hardware: the machine that the time was measured on, or that it is meant for
    #   time:     the time it takes there
    #   result:   the measured result

or, if it has not been run yet, with the following facts in place of time and result. A command that must be run before
it may be given too (encode).

    #   plan:     the command that forecasts it
    #   planned:  memory, time of a step, length and cost by that command
    #   sources:  the papers that its settings are from

Other files of conf/ may begin with a sentence.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

MEASURED = ("command", "hardware", "time", "result")
PLANNED = ("command", "hardware", "plan", "planned", "sources")
_FIELDS = {*MEASURED, *PLANNED, "encode"}


@dataclass(frozen=True)
class Head:
    """The comment at the head of a file: its purpose, and its facts by field name."""

    name: str
    purpose: str
    facts: dict[str, str] = field(default_factory=dict)  # by name, those of _FIELDS that are present


def read_head(path: Path) -> Head:
    """Parse the head of a file. A line without a field name continues the fact of the previous line."""
    purpose: list[str] = []
    facts: dict[str, str] = {}
    last = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# @package"):
            continue
        if not line.startswith("#"):
            break
        text = line.removeprefix("#").strip()
        name, colon, rest = text.partition(":")
        if colon and name in _FIELDS:
            last, facts[name] = name, rest.strip()
        elif last:
            facts[last] += " " + text
        else:
            purpose.append(text)
    return Head(path.stem, " ".join(purpose), facts)


def group(conf: Path, name: str) -> list[Head]:
    """Heads of all files of one config group, sorted by file name."""
    return [read_head(path) for path in sorted((conf / name).glob("*.yaml"))]


def help_text(usage: str, conf: Path) -> str:
    """Text of `--help`: the command's usage, the experiments, and the other config groups."""
    lines = [usage.strip(), "", "Experiments (their files in conf/experiment say command, hardware, time and cost):"]
    lines += [f"  experiment={head.name:<12} {first_sentence(head.purpose)}" for head in group(conf, "experiment")]
    lines += ["", "To look for a mistake, beside an experiment:"]
    lines += [f"  debug={head.name:<17} {first_sentence(head.purpose)}" for head in group(conf, "debug")]
    lines += ["", "Groups:"]
    for folder in sorted(path for path in conf.iterdir() if path.is_dir() and path.name not in ("experiment", "debug")):
        lines.append(f"  {folder.name + '=':<23} {', '.join(sorted(path.stem for path in folder.glob('*.yaml')))}")
    lines += [
        "",
        "Any key can be overridden: optim.lr=1e-3. All of them, with their meaning: docs/config_reference.md.",
        "  --cfg job               show the composed configuration and end",
        "  --hydra-help            Hydra's own options",
        "  source launch/completion.bash   complete keys, groups and values in bash",
    ]
    return "\n".join(lines)


def first_sentence(text: str) -> str:
    """Text up to the first full stop or colon that is followed by a space."""
    ends = [text.index(mark) for mark in (". ", ": ") if mark in text]
    return (text[: min(ends)] if ends else text).rstrip(".:")
