"""Take a source down: remove its clips from shards, indexes, side tables and records, and keep them from coming back.

    python -m data_tools.takedown SOURCE out=DIR [runs=[RUN,...]] [shards=[FILES,...]]

SOURCE is an id of licences.toml, the path of a film below videos=, or a film's SHA-256; `out` is what
`data_tools.curate` wrote. For each run in `runs`, the checkpoints that were trained on a sample of SOURCE are listed,
according to the run's ledger. Give all runs, before other shards are added. `shards` are further shards made from those
of OUT, such as encoded latents; they are rewritten without the samples of SOURCE too. OUT/takedowns.jsonl records what
was done. The films themselves are not deleted.

A consolidated index must be made again, and the data.cache.folder of other machines must be refilled.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from data_tools.candidates import say
from data_tools.curation.output import check_shards
from data_tools.curation.removal import find_removal, note, remove, remove_from_shard
from data_tools.curation.trained_on import checkpoints_that_saw
from data_tools.out_lock import alone_on
from data_tools.shard_writer import opened_journal
from sora_train.core.cli import InputError, run
from sora_train.core.options import number, options_and_paths
from sora_train.data.index.patterns import expand
from sora_train.data.read.store import Store


@dataclass
class Options:
    """The command's options; see the head of this file."""

    out: str
    runs: list[str] = number([])
    shards: list[str] = number([])


def main() -> int:
    """Remove a source, and print what was removed and which checkpoints were trained on it."""
    asked, sources = options_and_paths(Options, __doc__)
    if len(sources) != 1:
        raise InputError("name one source to take down; --help shows how")
    out = Path(asked.out)
    if not (out / "build.jsonl").is_file():
        raise InputError(f"out={out} holds nothing that data_tools.curate wrote")
    with alone_on(out):
        return _take_down(out, sources[0], asked)


def _take_down(out: Path, source: str, asked: Options) -> int:
    removal = find_removal(out, source)
    shards = [out / name for name in opened_journal(out).shards]
    found = [place for run_dir in asked.runs for place in checkpoints_that_saw(run_dir, shards, removal.keys)]
    removal.checkpoints = sorted({*removal.checkpoints, *found})
    note(out, removal)
    count = remove(out, removal)
    check_shards(opened_journal(out), 1)
    say(f"{out}: {len(removal.films)} film(s) of {source} taken down, {count} samples removed from shards")
    for shard in expand(asked.shards, Store()) if asked.shards else []:
        say(f"{shard}: {remove_from_shard(shard, set(removal.keys))} samples removed")
    for place in removal.checkpoints:
        say(f"trained on it: {place}")
    if not asked.runs:
        say("no runs= given: which checkpoints were trained on it is not known")
    return 0


if __name__ == "__main__":
    run(main)
