"""Names of shards from patterns."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path

from sora_train.core.cli import InputError
from sora_train.data.read.store import Store, scheme


def expand(
    patterns: Sequence[str],
    store: Store | None = None,
    what: str = "shard",
    keys: str = "data.sources and data.validation",
) -> list[str]:
    """Shards of glob patterns (`*`, `?`, `[...]`) and brace ranges (`{000..012}`, `{a,b}`), sorted per pattern.

    Files of another kind than shards are called `what` in errors, and configured by `keys`.
    Raises InputError for a pattern that names no file, or a local file that isn't there. A remote shard that is named
    without wildcards is looked for when it is first read.
    """
    from braceexpand import braceexpand  # comes with webdataset

    store = store or Store()
    found: list[str] = []
    for pattern in patterns:
        kind = scheme(pattern)
        try:
            paths = list(braceexpand(pattern))
        except ValueError as error:  # unbalanced braces
            raise InputError(f"{what} {pattern!r}: {error}") from error
        for path in paths:
            matches = store.list(path) if kind else _local_files(path)
            if not matches:
                raise InputError(f"no {what} at {path!r} (from {pattern!r}); check {keys}")
            found += matches
    if len(set(found)) != len(found):
        twice = sorted({path for path in found if found.count(path) > 1})
        instead = "use `repeat` to see samples more than once" if what == "shard" else f"check {keys}"
        raise InputError(f"{what} {twice[0]!r} is named twice; {instead}")
    return found


def _local_files(path: str) -> list[str]:
    names = glob.glob(path, recursive=True) if any(c in path for c in "*?[") else [path]  # noqa: PTH207
    return sorted(str(Path(name)) for name in names if Path(name).is_file())
