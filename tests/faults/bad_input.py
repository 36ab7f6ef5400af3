"""Bad input through real training at two ranks: what is refused, by whom, and that everything else arrives.

    python -m tests.faults.bad_input [each=20] [tars=200] [flips=400] [hard=true] [dropped=true] [samples=1000]
                                   [clips=5000] [seed=0] [folder=DIR] [write=true]

One run over `each` samples of every kind of fault (headers, payloads, captions, bombs, playlists, pickles), `tars`
damaged tars and `flips` media altered behind their index; one with decoders that die, and where it is to be `hard`,
that spin holding the interpreter's lock or eat memory; where it is to be `dropped`, two with `data.drop_refused`; two
with 5% and 50% of `samples` altered; one that watches memory over `clips` clips. 0 leaves a part out. Prints a table,
every fault of ours, and exits with 1 if there was one.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.report import command
from benchmarks.report import write as write_table
from sora_train.core.cli import InputError, run
from sora_train.core.options import options
from tests.faults import bad_trials as trials
from tests.faults.bad_corpus import corpus
from tests.faults.bed import Bed
from tests.faults.small_data import Found, Row


@dataclass
class Options:
    """Options: amounts, and the folder."""

    each: int = 20
    tars: int = 200
    flips: int = 400
    hard: bool = True
    dropped: bool = True
    samples: int = 1000
    clips: int = 5000
    seed: int = 0
    folder: str = ""
    write: bool = False  # the table into docs/results.md


def parts(bed: Bed, o: Options) -> Iterator[Callable[[], Found]]:
    """The runs that the options ask for."""
    if o.each:
        yield lambda: corpus(bed, o.each, o.tars, o.flips, o.seed)
        endings = ("crash", "all crash", *(("eat", "spin", "all spin") if o.hard else ()))
        yield lambda: trials.decoders(bed, endings, o.seed)
    if o.dropped:
        yield lambda: trials.left_out(bed, o.seed)
    if o.samples:
        yield lambda: trials.shares(bed, o.samples, o.seed)
    if o.clips:
        yield lambda: trials.memory(bed, o.clips, o.seed)


def main() -> int:
    """Run the campaign."""
    o = options(Options, __doc__)
    if min(o.each, o.tars, o.flips, o.samples, o.clips) < 0:
        raise InputError("numbers of inputs must not be below 0")
    rows: list[Row] = []
    wrong: list[str] = []
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        bed = Bed(Path(o.folder or temporary))
        for part in parts(bed, o):
            start = time.monotonic()
            found, faults = part()
            rows, wrong = [*rows, *found], [*wrong, *faults]
            print(f"{len(found)} rows in {time.monotonic() - start:.0f} s", flush=True)
    for fault in wrong:
        print(f"FAILED {fault}", flush=True)
    header = ("input", "count", "refused by the index", "refused in training", "trained on")
    table = [(name, *map(str, counts)) for name, *counts in rows]
    bad = sum(row[1] for row in rows if not row[0].startswith(("share", "data.", "rank")))
    about = (
        f"`{command()}`: {bad} bad inputs, "
        f"{time.monotonic() - began:.0f} s. No run stopped or hung that should not have; each sample was trained on "
        "or refused once an epoch, and each refusal stands in quarantine.jsonl with its cause; the good samples among "
        "them all arrived; no payload ran, nobody called at a listening port, no rank wrote beside its run folder."
    )
    if o.write and not wrong:
        write_table("Bad input", about, header, table)
    else:
        print("\n".join(" | ".join(row) for row in (header, *table)))
    return 1 if wrong else 0


if __name__ == "__main__":
    run(main)
