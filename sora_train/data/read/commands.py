"""Shards that are the output of a command (`pipe:rclone cat store:films/000.tar`), if the configuration allows it.

The words are passed to the program unchanged, without a shell, so nothing in a name can start a second program.
"""

from __future__ import annotations

import selectors
import shlex
import subprocess
from collections.abc import Iterator, Sequence

from sora_train.core.cli import InputError

PREFIX = "pipe:"
_SHELL = "|&;<>`$()\n"  # what only a shell would understand
_PIECE = 1 << 20


def is_command(shard: str) -> bool:
    """Tell whether a shard's name is a command."""
    return shard.lower().startswith(PREFIX)


def words(shard: str, allowed: Sequence[str]) -> list[str]:
    """The program of a command and its arguments; raises InputError unless the program is one of `allowed`."""
    text = shard[len(PREFIX) :]
    try:
        found = shlex.split(text)
    except ValueError as error:
        raise InputError(f"shard {shard!r} is no command: {error}") from error
    if not found or found[0] not in allowed:
        raise InputError(
            f"shard {shard!r} is a command; commands in shard names are not run, but those of data.commands="
            f"{list(allowed)}"
        )
    if strange := [character for character in _SHELL if character in text]:
        raise InputError(f"shard {shard!r}: no shell reads it, so {strange[0]!r} means nothing; name a script instead")
    return found


def printed(command: Sequence[str], timeout_s: float) -> Iterator[bytes]:
    """Run a command and yield its output in pieces. Raises OSError where it fails, or is silent for `timeout_s`."""
    from webdataset.gopen import Pipe

    pipe = Pipe(list(command), mode="rb", bufsize=0, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(pipe.stream, selectors.EVENT_READ)
            while selector.select(timeout_s):
                piece = pipe.stream.read(_PIECE)
                if not piece:
                    break
                yield piece
            else:
                raise OSError(f"{command[0]} printed nothing for {timeout_s:g} s")
    except BaseException:
        pipe.ignore_errors = True  # that it was killed is no news
        pipe.proc.kill()
        raise
    finally:
        pipe.close()  # waits for its end; raises OSError where the program says that it failed
