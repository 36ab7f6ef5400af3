"""Progress messages of a run: a progress bar on a terminal, plain lines elsewhere, and a log file for every rank."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

from rich.console import Console as Terminal
from rich.progress import BarColumn, Progress, TextColumn

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def setup_logging(run_dir: Path, rank: int) -> Path:
    """Send this process's `logging` (INFO and up) to `run_dir/logs/rank-N.log`, appending; return the file.

    Warnings of rank 0 go to stderr too. Calling it again replaces the earlier set-up.
    """
    path = run_dir / "logs" / f"rank-{rank}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    handlers: list[logging.Handler] = [logging.FileHandler(path, encoding="utf-8")]
    if rank == 0:
        handlers.append(logging.StreamHandler(sys.stderr))
        handlers[-1].setLevel(logging.WARNING)
    logging.basicConfig(level=logging.INFO, format=_FORMAT, handlers=handlers, force=True)
    return path


class Console:
    """Progress of the run on standard output of the main rank, and in the log file of every rank."""

    def __init__(self, total_steps: int, is_main: bool, run_dir: Path, stream: TextIO | None = None) -> None:
        self._total = total_steps
        self._is_main = is_main
        self._stream = stream or sys.stdout
        self._log = logging.getLogger(f"sora_train.run.{run_dir.name}")
        self._first: tuple[int, float] | None = None  # step and time of the first report since the start, for the ETA
        self._bar: Progress | None = None
        if is_main and self._stream.isatty():
            columns = (TextColumn("step {task.completed}/{task.total}"), BarColumn(), TextColumn("{task.description}"))
            self._bar = Progress(*columns, console=Terminal(file=self._stream))
            self._task = self._bar.add_task("", total=total_steps)
            self._bar.start()

    def step(self, step: int, values: Mapping[str, float | int]) -> None:
        """Report a logged step: those of loss, grad_norm, lr, tokens_per_s, data_wait and mfu that are in `values`."""
        if not self._is_main:
            return
        text = f"{_figures(values)} eta {self._eta(step)}"
        self._log.info("step %d/%d %s", step, self._total, text)
        if self._bar is None:
            self._print(f"step {step}/{self._total} {text}")
        else:
            self._bar.update(self._task, completed=step, description=text)

    def say(self, text: str) -> None:
        """Print a line, above the progress bar if there is one, and log it."""
        self._log.info("%s", text)
        if not self._is_main:
            return
        if self._bar is None:
            self._print(text)
        else:
            self._bar.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        """Stop the progress bar; its last state stays on the screen."""
        if self._bar is not None:
            self._bar.stop()

    def _print(self, text: str) -> None:
        """Print a line. If standard output fails (closed pipe, full disk), training goes on with the log alone."""
        try:
            print(text, file=self._stream, flush=True)
        except (OSError, ValueError) as error:
            if self._is_main:
                self._log.warning("standard output is gone (%s); from here on only the log speaks", error)
            self._is_main = False

    def _eta(self, step: int) -> str:
        now = time.monotonic()
        if self._first is None or step <= self._first[0]:
            self._first = (step, now)
            return "?"
        first, then = self._first
        return duration((self._total - step) * (now - then) / (step - first))


def _figures(values: Mapping[str, float | int]) -> str:
    """Format the figures of a progress line; absent ones are left out."""
    formats = {
        "loss": lambda v: f"loss {v:.4f}",
        "grad_norm": lambda v: f"grad {v:.2f}",
        "lr": lambda v: f"lr {v:.1e}",
        "tokens_per_s": lambda v: f"{short(v)} tok/s",
        "data_wait": lambda v: f"data wait {v:.1%}",
        "mfu": lambda v: f"mfu {v:.0%}",
    }
    return " ".join(show(values[key]) for key, show in formats.items() if key in values)


def short(value: float) -> str:
    """Format a number in at most five characters: 7.1k, 2.35M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """Format seconds in the two largest units: 6m12s, 3h05m, 2d04h."""
    whole = max(0, round(seconds))
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if days:
        return f"{days}d{hours % 24:02d}h"
    if hours:
        return f"{hours}h{minutes % 60:02d}m"
    return f"{minutes}m{whole % 60:02d}s" if minutes else f"{whole}s"
