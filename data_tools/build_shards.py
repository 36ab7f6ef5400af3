"""Turn a folder of captioned videos and images into WebDataset shards.

    python -m data_tools.build_shards videos=DIR out=DIR [captions=FILE|FOLDER|none] [columns=file:NAME,caption:NAME]
        [root=FOLDER] [encoding=utf-8] [validation=0] [source=file] [update=false] [shard_size=256] [workers=null]
        [probe=all]

Captions come from a table (`captions=`: CSV, TSV, JSON, JSON lines, Parquet; other columns are kept as fields), from a
folder of texts, or from files beside `NAME.mp4`: `NAME.txt`, `NAME.mp4.txt`, `NAME.json`. Columns are recognised by
their usual names, or given: `columns=file:clip,caption:short+long,start:from,end:to`. If the table's paths come from
another machine, `root` is the folder there that `videos=` is here. `encoding` is that of texts which aren't UTF-8.
Several rows of a file are several captions, one of which is drawn for each visit. Rows with a start and an end
(seconds) become separate clips; their packets are copied without re-encoding. With `captions=none` samples have no
captions: an autoencoder can be trained on them.

`validation=0.05` keeps a twentieth of the sources in OUT/validation. A source is a file (`source=folder`: a folder;
`source=NAME`: a value of that column). All clips of a source go to the same side, also in later calls.

Media bytes are copied unchanged. By default every frame of a file is decoded, and a file with damage anywhere is
refused (`probe=frame`: only its first frame is decoded; `probe=packets`: only its headers are read). Refused files are
listed in `refused.jsonl` with the reason. `shard_size` is in MiB. Names that begin with a dot are left out. Give the
same command again to resume after an interruption, or to append files added since; `build.jsonl` records which sample
is in which shard. Changed captions and videos are detected; `update=true` rewrites their shards.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_tools.candidates import NONE, Candidate, CaptionOptions, Refusals, file_of, find_candidates, say
from data_tools.captions import Refused
from data_tools.changes import find_changes, rewrite
from data_tools.columns import Columns
from data_tools.media_files import Media, find_media, hash_of, key_of, media_extension
from data_tools.sample_builder import Sample, SampleBuilder
from data_tools.shard_writer import Journal, Mark, ShardWriter
from data_tools.tables import check_encoding
from sora_train.config.schema import Probe
from sora_train.core.cli import InputError, run
from sora_train.core.options import number, options
from sora_train.data.read.decode import IMAGES, VIDEOS

VALIDATION = "validation"  # folder of shards that are held out


@dataclass
class Options:
    """The command's options; see the head of this file."""

    videos: str = ""
    out: str = ""
    captions: str | None = None
    columns: str | None = None
    root: str | None = None
    encoding: str | None = None
    validation: float = number(0.0, least=0, below=1)  # share of the sources
    source: str = "file"
    update: bool = False
    shard_size: float = number(256.0, above=0)  # MiB
    workers: int | None = number(None, least=1)
    probe: Probe = Probe.all  # when building, a refused file can still be repaired


def main() -> int:
    """Build the shards that the command line describes."""
    asked = options(Options, __doc__)
    folder, out = _checked(asked)
    media = find_media(folder)
    if not media.files:
        raise InputError("; ".join([f"no video or image in {folder}; looked for {', '.join(VIDEOS + IMAGES)}",
                                    *media.passed_over()]))  # fmt: skip
    captions = CaptionOptions(asked.captions, Columns.parse(asked.columns), asked.encoding, asked.root)
    refusals = Refusals()
    candidates = find_candidates(folder, media, captions, refusals)
    limit = int(asked.shard_size * 2**20)
    made_with = {"videos": str(folder.resolve()), "shard_size": limit, "validation": asked.validation}
    journal = Journal(out, made_with | ({"source": asked.source} if asked.validation else {}))
    changed = find_changes(journal, folder, candidates)
    if changed and not asked.update:
        raise InputError(f"{changed}: give update=true to write their shards in {out} anew, or choose another out=")
    done = journal.samples
    held_out = _split(journal, candidates, asked)
    pending = _without_copies(folder, media, [c for c in candidates if c.name not in done], done, refusals)
    builder = SampleBuilder(folder, out, asked.workers or os.cpu_count() or 1, asked.probe, refusals)
    rewrite(journal, changed, lambda again: builder.build(again, "reading what changed"))
    added = _write(journal, limit, builder.build(pending, "building shards"), held_out)
    refusals.write(out / "refused.jsonl")
    if not journal.samples:
        raise InputError(
            f"none of the {len(media.files)} files in {folder} can be used; {out / 'refused.jsonl'} says why"
        )
    _report(out, journal, added, changed.done(), refusals)
    return 0


def _report(out: Path, journal: Journal, added: int, updated: str, refusals: Refusals) -> None:
    total = f"{len(journal.samples)} samples in {len(journal.shards)} shards; {refusals}"
    say(f"{out}: {f'{added} samples added' if added else 'nothing to add'}{updated}, {total}")
    held = {name: samples for name, samples in journal.shards.items() if Path(name).parent.name == VALIDATION}
    if "below" in journal.notes:
        count = sum(map(len, held.values()))
        say(f"{count} of {len(journal.samples)} samples are held out: data.sources.NAME.shards=[{out}/shard-*.tar] "
            f"data.validation=[{out}/{VALIDATION}/shard-*.tar]")  # fmt: skip


def _checked(asked: Options) -> tuple[Path, Path]:
    missing = [f"{name}=..." for name in ("videos", "out") if not getattr(asked, name)]
    if missing:
        raise InputError(f"missing: {', '.join(missing)}; --help shows what they mean")
    check_encoding(asked.encoding)
    folder, out = Path(asked.videos), Path(asked.out)
    if not folder.is_dir():
        raise InputError(f"videos={folder} is {'not a folder' if folder.exists() else 'not there'}")
    if asked.captions and asked.captions != NONE and not Path(asked.captions).is_file() | Path(asked.captions).is_dir():
        raise InputError(f"captions={asked.captions} is not a file, a folder of texts, or {NONE}")
    return folder, out


def _split(journal: Journal, candidates: Sequence[Candidate], asked: Options) -> Callable[[Candidate], bool]:
    """Build a function that tells whether a candidate is held out.

    A candidate is held out if the hash of its source is below a limit. The first run sets the limit by the share
    `validation`, and later runs read it from the journal, so that no source changes sides when files are added.
    """
    if not asked.validation:
        return lambda candidate: False
    if asked.source not in ("file", "folder") and not any(asked.source in c.fields for c in candidates):
        known = sorted({name for c in candidates for name in c.fields} - {"caption", "captions"})
        raise InputError(f"source={asked.source} is no column of the table; file, folder, or one of {known}")

    def place(candidate: Candidate) -> str:
        return hashlib.sha256(os.fsencode(candidate.group(asked.source))).hexdigest()

    if "below" not in journal.notes:
        places = sorted({place(candidate) for candidate in candidates})
        count = min(max(1, round(asked.validation * len(places))), len(places) - 1)
        if count < 1:
            raise InputError(
                f"validation={asked.validation:g} can't split {len(places)} source(s); set source= or leave it"
            )
        journal.note("below", places[count])
    below = journal.notes["below"]
    return lambda candidate: place(candidate) < below


def _without_copies(
    folder: Path, media: Media, candidates: list[Candidate], done: dict[str, Mark], refusals: Refusals
) -> list[Candidate]:
    """Refuse candidates whose file has the same bytes as an earlier one, or as one in a shard. Returns the others."""
    in_shards = {file_of(name) for name in done} & set(media.files)
    order = dict.fromkeys([*sorted(in_shards), *(candidate.file for candidate in candidates)])
    copies = _copies(folder, list(order))
    for file in dict.fromkeys(c.file for c in candidates if c.file in copies):
        refusals.add(file, Refused("duplicate", f"the same bytes as {copies[file]}"))
    return [candidate for candidate in candidates if candidate.file not in copies]


def _copies(folder: Path, files: list[str]) -> dict[str, str]:
    """Map each file that has the same bytes as an earlier file to that one. Only files of equal size are compared."""
    by_size: dict[tuple[str | None, int], list[str]] = {}
    for file in files:
        by_size.setdefault((media_extension(file), (folder / file).stat().st_size), []).append(file)
    copies: dict[str, str] = {}
    for group in by_size.values():
        first: dict[str, str] = {}
        for file in group if len(group) > 1 else []:
            hashed = hash_of(folder / file)
            if first.setdefault(hashed, file) != file:
                copies[file] = first[hashed]
    return copies


def _write(journal: Journal, limit: int, samples: Iterator[Sample], held_out: Callable[[Candidate], bool]) -> int:
    """Write samples into training and validation shards, and return their number."""
    writers = {False: ShardWriter(journal, limit), True: ShardWriter(journal, limit, VALIDATION)}
    added = 0
    for candidate, (mark, members) in samples:
        writers[held_out(candidate)].add(key_of(candidate.name), candidate.name, mark, members)
        added += 1
    for writer in writers.values():
        writer.close()
    return added


if __name__ == "__main__":
    run(main)
