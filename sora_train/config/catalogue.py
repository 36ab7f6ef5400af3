"""What conf/ offers, read from the heads of its files: experiments with purpose, command, hardware, time and result.

An experiment file begins with

    # @package _global_
    # PURPOSE, a sentence.
    #   command:  what starts it
    #   hardware: what the time was measured on, or what it is meant for
    #   time:     how long it takes there
    #   result:   what it ends with, measured

and other files under conf/ with a sentence, if anything is to be said.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

FIELDS = ("command", "hardware", "time", "result")


@dataclass(frozen=True)
class Head:
    """The comment that a file begins with."""

    name: str
    purpose: str
    facts: dict[str, str] = field(default_factory=dict)  # of FIELDS, those that are there


def read_head(path: Path) -> Head:
    """The head of a file; a fact may go on over lines that are indented further."""
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
        if colon and name in FIELDS:
            last, facts[name] = name, rest.strip()
        elif last:
            facts[last] += " " + text
        else:
            purpose.append(text)
    return Head(path.stem, " ".join(purpose), facts)


def group(conf: Path, name: str) -> list[Head]:
    """The heads of one group of conf/."""
    return [read_head(path) for path in sorted((conf / name).glob("*.yaml"))]


def help_text(usage: str, conf: Path) -> str:
    """What `--help` prints: the command, experiments, and what else can be chosen."""
    lines = [usage.strip(), "", "Experiments (their files in conf/experiment say command, hardware, time and result):"]
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
    """Up to the first full stop or colon that ends a word."""
    ends = [text.index(mark) for mark in (". ", ": ") if mark in text]
    return (text[: min(ends)] if ends else text).rstrip(".:")
