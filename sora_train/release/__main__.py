"""Responsible release: marks, provenance, guards, red teaming, cards.

    python -m sora_train.release init provider="Example Lab" [contact=...] [release=FOLDER]
        [certificate=chain.pem key=key.pem trust=root.pem] [algorithm=es256] [timestamps=URL]
        [mark=classical|none|VIDEOSEAL.jit] [words=FILE]
    python -m sora_train.release verify video=FILE [trust=root.pem] [release=FOLDER]
    python -m sora_train.release sign video=FILE out=FILE generator="..." [release=FOLDER]
    python -m sora_train.release redteam run_dir=RUN prompts=FILE.jsonl out=FOLDER [seconds=] [steps=] [count=] [seed=]
    python -m sora_train.release redteam compare=[FOLDER,FOLDER]
    python -m sora_train.release cards run_dir=RUN facts=FACTS.yaml out=FOLDER [redteam=FOLDER]

`init` makes the release folder. From then on `sample` guards, marks and signs videos; `release=off` switches this off.
`verify` exits with 0 if the file has a trusted manifest or this folder's mark. `redteam` measures which prompts the
guards block and which get through. `cards` writes the model card, the data card and the summary of training content
from the run's files and FACTS.yaml. See docs/release.md.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from sora_train.core.cli import InputError, nearest, run
from sora_train.core.options import options

COMMANDS = ("init", "sign", "verify", "redteam", "cards")


def main() -> int:
    """Run the subcommand that the command line names."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        return 0
    name = sys.argv.pop(1)
    if name not in COMMANDS:
        raise InputError(f"there is no {name!r}; {nearest(name, list(COMMANDS))}")
    try:
        schema, command = _command(name)
    except ImportError as error:
        raise InputError(f"{error.name} isn't installed: pip install 'sora_train[release]'") from error
    return command(options(schema, __doc__))


def _command(name: str) -> tuple[Any, Callable[[Any], int]]:
    """Options dataclass and function of a command. Only that command's modules are imported."""
    if name == "redteam":
        from sora_train.release import redteam

        return redteam.Options, redteam.main
    if name == "cards":
        from sora_train.release import cards

        return cards.Options, cards.main
    from sora_train.release import commands

    its: dict[str, tuple[Any, Callable[[Any], int]]] = {
        "init": (commands.Init, commands.init), "sign": (commands.Sign, commands.sign),
        "verify": (commands.Verify, commands.check),
    }  # fmt: skip
    return its[name]


if __name__ == "__main__":
    run(main)
