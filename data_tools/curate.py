"""Turn raw footage into shards: films are cut into clips, which are scored, deduplicated, captioned and licensed.

    python -m data_tools.curate videos=DIR out=DIR [captions=none|beside|URL|FOLDER] [licences=FILE | licence=NAME]
        [keep="motion >= 0.001 and ..."] [until=scores] [forbidden=FILE] [min_seconds=2] [max_seconds=20] [trim=0.25]
        [short_side=256] [max_side=null] [cut_threshold=3] [near=8] [review=12] [near_model=FOLDER] [near_cosine=0.95]
        [cut=encode|copy] [crf=18] [gop=24] [model=NAME] [stills=8] [requests=8] [shard_size=256] [workers=null]
        [engine=pool|ray] [strict=false]

Each film is decoded once to find shots, borders and scores; those that stay are then cut, frame by frame. `keep` is the
rule for clips, over their scores; `until=scores` ends before the cutting, with the report, so that a rule can be found:
another rule decodes nothing. The same rule is a filter of training (`data.filter`), with OUT/scores.parquet as a side
table.

Films without an allowed licence are left out: `licences.toml` in videos= says which have which, or licence=NAME all of
them. `forbidden` is a list of hashes (MD5, SHA-1, SHA-256, or of pictures) of what must not be here: of a hit nothing
but its name is kept.

`captions` is the address of a server with OpenAI's interface (http://HOST:8000/v1; key from OPENAI_API_KEY, `model` its
model), a folder of a local vision-language model, `beside` (the texts beside the films), or `none`. Clips shorter than
min_seconds are left out, longer than max_seconds are split; `trim` seconds go where a shot meets another. With
cut=copy clips are spans of their film's own packets, not encoded anew, where no border has to be cut off. Of clips that
differ by at most `near` of 64 bits one stays; up to `review` bits they are listed. A network in near_model also drops
those whose vectors have a cosine of near_cosine or more.

Kill it at any moment and give the same command again: what is done isn't done again, and the shards are the same bytes.
New films are added; OUT/report.html, OUT/dropped.jsonl and OUT/sources.jsonl say what became of each.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from data_tools.curation.settings import Settings
from data_tools.out_lock import alone_on
from sora_train.core.cli import InputError, run
from sora_train.core.options import options
from sora_train.core.outputs import usable

if TYPE_CHECKING:
    from data_tools.curation.engine import Engine
    from data_tools.curation.pipeline import Curated

Options = Settings


def main() -> int:
    """Curate the films that the command line describes.

    Worker processes import this module, so what they don't need (torch, by way of webdataset) is imported in here.
    """
    from data_tools.curation.licences import read_licences
    from data_tools.curation.pipeline import REPORT, Pipeline
    from data_tools.curation.report import write_report

    asked = options(Settings, __doc__)
    folder, out = Path(asked.videos), Path(asked.out)
    if not folder.is_dir():
        raise InputError(f"videos={folder} is {'not a folder' if folder.exists() else 'not there'}")
    if asked.max_seconds < asked.min_seconds:
        raise InputError(f"max_seconds={asked.max_seconds:g} must be at least min_seconds={asked.min_seconds:g}")
    licences = read_licences(folder, asked.licences, asked.licence)
    with usable(out, "out"):
        out.mkdir(parents=True, exist_ok=True)
    with alone_on(out):
        engine = _engine(asked)
        pipeline = Pipeline(asked, licences, engine)
        try:
            done = pipeline.run()
        finally:
            engine.close()
        done.outcomes.write(out / "dropped.jsonl")
        write_report(out / REPORT, pipeline, done)
    return _say(asked, out, done)


def _engine(asked: Settings) -> Engine:
    if asked.engine == "ray":
        from data_tools.curation.on_ray import RayEngine

        return RayEngine(asked.workers)
    from data_tools.curation.engine import ProcessPool

    return ProcessPool(asked.workers_or_all)


def _say(asked: Settings, out: Path, done: Curated) -> int:
    from data_tools.candidates import say
    from data_tools.curation.pipeline import REPORT

    for alarm in done.outcomes.alarms:
        say(f"note: {alarm}")
    failed = sum(line.failed.total() for line in done.outcomes.yields)
    if failed:
        say(f"{failed} failed and are tried again by the same command; {out / 'dropped.jsonl'} names them")
    say(f"{out / REPORT}: what was kept and why the rest was not")
    if asked.until == "scores":
        return 0
    if not done.stored:
        raise InputError(f"no clip is left of the films in {asked.videos}; {out / 'dropped.jsonl'} says why")
    say(
        f"{out}: {done.added} clips added, {len(done.stored)} in all; to train on them: "
        f"data.sources.mine.shards=[{out}/*.tar]"
    )
    say(f"to choose among them by score: data.side_tables=[{out}/scores.parquet] 'data.filter={asked.keep}'")
    return 0


if __name__ == "__main__":
    run(main)
