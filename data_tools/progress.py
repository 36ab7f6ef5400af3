"""Progress of a command: a bar on a terminal, or a plain line every few seconds in a log file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_LINE_EVERY_S = 10.0


@contextmanager
def progress(total: int, what: str) -> Iterator[Callable[[int], None]]:
    """Show the progress of `total` items. Yields a function to call with the number done since the last call."""
    console = Console(stderr=True)
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bars:
            bar = bars.add_task(what, total=total)
            yield lambda count: bars.advance(bar, count)
        return
    done, printed = 0, time.monotonic()

    def advance(count: int) -> None:
        nonlocal done, printed
        done += count
        if time.monotonic() - printed >= _LINE_EVERY_S:
            printed = time.monotonic()
            print(f"{what}: {done} of {total}", flush=True)

    yield advance
