"""Conventions of all commands: one line and exit code 2 for bad input, and `key=value` options of the tools."""

from __future__ import annotations

import sys
from collections.abc import Callable
from difflib import get_close_matches
from typing import TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

BAD_INPUT = 2  # exit code: wrong configuration or input; the same command would fail again
STOPPED = 75  # exit code: stopped by a signal after saving; give the same command again

Options = TypeVar("Options")


class InputError(Exception):
    """Bad configuration or input. The message is one line: what is wrong, where, and what to do about it."""


def run(main: Callable[[], int | None]) -> None:
    """Run a command's `main` and exit with its code; an InputError becomes one line on stderr and exit code 2."""
    try:
        code = main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        code = BAD_INPUT
    sys.exit(code or 0)


def options(schema: type[Options], usage: str | None) -> Options:
    """Read `key=value` arguments into the dataclass `schema`; `--help` prints `usage`.

    Raises InputError for an unknown key (naming the nearest), a wrong type, or a missing value.
    """
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(usage)
        sys.exit(0)
    fields = OmegaConf.structured(schema)
    for argument in sys.argv[1:]:
        key, equals, _ = argument.partition("=")
        if not equals:
            raise InputError(f"{argument!r} is not of the form key=value; --help shows the keys")
        if key not in list(fields):  # `key in fields` is False for a key without a default
            raise InputError(f"there is no option {key!r}; {nearest(key, list(fields))}")
    try:
        values = OmegaConf.merge(fields, OmegaConf.from_dotlist(sys.argv[1:]))
        missing = sorted(OmegaConf.missing_keys(values))
        if missing:
            raise InputError(f"missing: {', '.join(f'{key}=...' for key in missing)}; --help shows what they mean")
        return OmegaConf.to_object(values)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise InputError(str(error).splitlines()[0]) from error


def nearest(key: str, known: list[str]) -> str:
    """A sentence that names the nearest of the known keys, or all of them."""
    close = get_close_matches(key, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known))}"
