"""Compare runs: differences of their configurations, last values, and curves.

python -m sora_train.compare RUN RUN ... [figures=[loss,mfu]] [html=compare.html] [png=compare.png]
python -m sora_train.compare RUN                     writes RUN/report.html

python -m sora_train.compare RUN RUN metrics=[shape,psnr_db]      two evaluations clip by clip, or metrics=all
python -m sora_train.compare a.json b.json metrics=all            the same for files that `evaluate` wrote

python -m sora_train.compare RUN RUN ... evaluation=prompts [metrics=[binding]] [html=sizes.html]
                                                     one evaluation of many runs by size of model and time of training

figures    for the table and the PNG (loss, validation_loss, tokens_per_s, mfu, step_time)
html       one page with everything: curves, samples, differences, events; or the table of an evaluation
evaluation `clips` (of `evaluate run_dir=RUN`), or the name of the prompt file that all were evaluated on
png        the curves, drawn by matplotlib
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from sora_train.core.cli import InputError, run
from sora_train.core.options import options_and_paths
from sora_train.evaluation.by_size import read_sized, rows_of, sizes_page, sizes_table
from sora_train.evaluation.paired import print_differences
from sora_train.operations.records import Record, read
from sora_train.operations.report import runs_page, write_report
from sora_train.operations.side_by_side import plot, table


@dataclass
class Options:
    """Options of the command in addition to run folders."""

    figures: list[str] = field(
        default_factory=lambda: ["loss", "validation_loss", "tokens_per_s", "mfu", "step_time", "samples", "goodput"]
    )
    html: str = ""
    png: str = ""
    metrics: list[str] = field(default_factory=list)
    evaluation: str = ""


def main() -> int:
    """Compare the runs that the command line names."""
    wanted, folders = options_and_paths(Options, __doc__)
    if not folders:
        raise InputError("name at least one run folder; --help shows how")
    if wanted.evaluation:
        return _by_size(wanted, folders)
    if wanted.metrics:
        return print_differences(folders, wanted.metrics)
    records = _told_apart([read(folder) for folder in folders])
    table(records, wanted.figures)
    if len(records) == 1:
        print(write_report(records[0]))
    if wanted.html:
        Path(wanted.html).write_text(runs_page("Comparison of runs", records), encoding="utf-8")
    if wanted.png:
        plot(records, wanted.figures, Path(wanted.png))
    return 0


def _by_size(wanted: Options, folders: list[str]) -> int:
    runs = read_sized(folders, wanted.evaluation)
    header, rows = rows_of(runs, [] if wanted.metrics == ["all"] else wanted.metrics)
    Console().print(sizes_table(header, rows))
    if wanted.html:
        about = f"Evaluation {wanted.evaluation!r} of {len(runs)} runs, {runs[0].evaluation['videos']} videos each"
        Path(wanted.html).write_text(sizes_page(about, header, rows), encoding="utf-8")
    return 0


def _told_apart(records: list[Record]) -> list[Record]:
    """Copy of the records in which runs with equal names are named by their paths."""
    names = [record.name for record in records]
    return [
        Record(str(r.folder), r.folder, r.config, r.curves, r.end, r.quarantine) if names.count(r.name) > 1 else r
        for r in records
    ]


if __name__ == "__main__":
    run(main)
