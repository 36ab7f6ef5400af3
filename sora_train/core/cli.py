"""Conventions of all commands: exit codes, and one-line errors. `sora_train.core.options` parses their options."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from difflib import get_close_matches

BAD_INPUT = 2  # exit code: wrong configuration or input; the same command would fail again
STOPPED = 75  # exit code: stopped by a signal after saving; give the same command again


class InputError(Exception):
    """Bad configuration or input. The message is one line: what is wrong, where, and what to do about it."""


def run(main: Callable[[], int | None]) -> None:
    """Run a command's `main` and exit with its code.

    An InputError, or a value that is too long for the name of a file, becomes one line on stderr and exit code 2.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal without UTF-8 still shows what it can
    try:
        code = main()
        sys.stdout.flush()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        code = BAD_INPUT
    except BrokenPipeError:  # the reader of the output (e.g. `| head`) has exited
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        code = 1
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        name = f"{str(error.filename)[:40]!r}..."
        print(f"error: {name} is too long for the name of a file; is it a text, for another option?", file=sys.stderr)
        code = BAD_INPUT
    sys.exit(code or 0)


def nearest(key: str, known: list[str]) -> str:
    """A sentence that names the nearest of the known keys, or all of them."""
    close = get_close_matches(key, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known))}"
