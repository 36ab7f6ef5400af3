"""Turn raw footage into shards: films with a licence are cut into clips, which are scored, deduplicated and captioned.

    python -m data_tools.curate videos=DIR out=DIR [captions=none|beside|URL|FOLDER] [licences=FILE | licence=NAME]
        [keep="motion >= 0.001 and ..."] [until=scores] [forbidden=FILE] [min_seconds=2] [max_seconds=20] [trim=0.25]
        [short_side=256] [max_side=null] [cut_threshold=3] [near=8] [review=12] [near_model=FOLDER] [near_cosine=0.95]
        [cut=encode|copy] [crf=18] [gop=24] [model=NAME] [stills=8] [requests=8] [shard_size=256] [workers=null]
        [engine=pool|ray] [strict=false]

Each film is decoded once to find shots, borders and scores; the clips that are kept are then cut, exact to the frame.
`keep` is the rule that clips must meet, an expression over their scores. `until=scores` writes the report and ends
before cutting, so that rules can be tried; a new rule decodes nothing. The same rule can be a filter of training
(`data.filter`), with OUT/scores.parquet as a side table.

Films without an allowed licence are left out. `licences.toml` in videos= tells the licence of each film; licence=NAME
is one for all films. `forbidden` is a file of hashes (MD5, SHA-1, SHA-256, or of pictures) of material that must not be
used: of a film that matches, only its name is recorded.

`captions` is the address of a server with OpenAI's interface (http://HOST:8000/v1; key from OPENAI_API_KEY, `model` its
model), a folder of a local vision-language model, `beside` (the texts beside the films), or `none`. Clips shorter than
min_seconds are left out, longer ones than max_seconds are split. `trim` seconds are removed where a shot meets another.
With cut=copy the film's packets are copied without re-encoding where possible (not if a border has to be cut off, for
example). Of clips whose hashes differ by at most `near` of 64 bits one is kept; pairs of up to `review` bits are
listed. With a network in near_model, clips are also dropped if their feature vectors have a cosine of near_cosine or
more with those of another clip.

The command can be killed at any time; given again, it repeats no finished work and writes the same shards, byte for
byte. New films are added. OUT/report.html, OUT/dropped.jsonl and OUT/sources.jsonl tell the outcome of each film.
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

    Worker processes import this module, so imports that they don't need (torch, through webdataset) are in here.
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
