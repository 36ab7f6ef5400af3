"""Write a table of measurements to docs/results.md; each section is replaced by its latest run."""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import deepspeed
import torch

_ROOT = Path(__file__).parents[1]
_FILE = _ROOT / "docs" / "results.md"


def command() -> str:
    """The command that is running, without where its files are."""
    given = [a for a in sys.argv[1:] if not a.startswith("write=") and "/" not in a]
    module = Path(sys.argv[0]).resolve().relative_to(_ROOT).with_suffix("")
    return " ".join(("python -m", ".".join(module.parts), *given))


def _cpu() -> str:
    """The processor's name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
    return f" of {found[1]}" if found else ""


def write(title: str, about: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table, and put it in docs/results.md under `title`, with date, machine and versions."""
    lines = [" | ".join(("", *row, "")).strip() for row in (header, ["---"] * len(header), *rows)]
    device = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads{_cpu()}"
    )
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, deepspeed {deepspeed.__version__}"
    section = "\n".join((f"## {title}", "", about, "", *lines, "", f"{date.today()}, {device}, {versions}", ""))
    old = _FILE.read_text() if _FILE.exists() else "# Results\n\nWritten by benchmarks/ and tests/faults/.\n"
    kept = re.sub(rf"\n## {re.escape(title)}\n.*?(?=\n## |\Z)", "", old, flags=re.S).rstrip()
    _FILE.write_text(f"{kept}\n\n{section}")
    print(section)
