"""Check shards for faults of the tar, the names, the media, the captions and the index, counted by cause.

    python -m data_tools.lint SHARD [SHARD ...] [format=table|json] [examples=3] [probe=all]

Shards are paths, globs, brace ranges or URLs. Videos and images are checked as for the index (`probe=all`: every frame
is decoded). If a shard has an index, the checksum of every member is compared. Nothing is written. Exit code: 0 no
errors, perhaps warnings; 1 errors, which are faults that lose samples; 2 wrong usage.
"""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from data_tools.progress import progress
from sora_train.config.schema import DataConfig, Probe
from sora_train.core.cli import InputError, run
from sora_train.core.options import choice, number, options_and_paths
from sora_train.data.index.captions import CAPTIONS
from sora_train.data.index.files import is_current
from sora_train.data.index.index import load_rows
from sora_train.data.index.patterns import expand
from sora_train.data.index.places import index_path
from sora_train.data.index.scan import scan_shard
from sora_train.data.index.tar import Fault, Member, walk
from sora_train.data.read.decode import IMAGES, VIDEOS
from sora_train.data.read.pool import Pool
from sora_train.data.read.store import Store

MEANING = {  # cause -> what it means and what to do; those in WARNINGS lose no samples
    "interleaved": "members of a sample are not adjacent; readers that stream see half samples: rebuild the shard",
    "dots_in_name": "the key ends at the first dot, so these files fall together: rename them",
    "hostile_name": "an absolute name, or one with ..; names are never paths here: harmless, but look who made it",
    "link": "a link or a device; it is passed over",
    "executable": "a pickle or an archive, which other loaders would execute or unpack; it is passed over",
    "no_index": "no index; it is made on first use, or by data_tools.index",
    "stale_index": "the index is of another file or version; it is made anew on first use, or by data_tools.index",
    "foreign_index": "a file that is not an index lies in its place: move it away",
    "checksum": "the bytes are not those that were indexed: fetch the shard again",
    "key_twice": "the same key in two shards",
    "same_media": "the same video or image under several keys",
    "duplicate": "a member comes twice in a shard",
    "tar_no_end_mark": "the tar has no end mark: it may have been cut between two members; fetch or build it again",
    "tar_truncated": "the tar is cut inside a member: fetch or build it again",
    "tar_bad_header": "a member header is damaged; what follows up to the next intact one is lost",
    "tar_zeros": "zeros where a member should be",
    "tar_not_a_tar": "not a tar: perhaps an error page or a compressed file",
    "tar_empty": "no bytes",
    "no_samples": "not one sample in it",
    "variable_rate": "frames come at a variable rate; they are taken by time",
    "careful": "decord would count its frames wrongly or show it wrongly; read by PyAV, which is slower",
    "sequential": "no frame of it can be asked for alone: decoded from the start, slow in a long video; encode it anew",
    "hdr": "HDR (PQ or HLG), trained on as stored, which looks pale; data.tone_map=true brings it to SDR",
    "interlaced": "interlaced, trained on as stored: moving edges are combs; data.deinterlace=true takes them away",
    "pixel_aspect": "its pixels are no squares; it is stretched as players show it",
    "still": "a video of one frame",
    "ignored_field": "a field of the jsons that is no column of the index, so that no filter can use it",
    "no_caption": "no caption; an autoencoder can be trained on it all the same",
    "caption_type": "the caption is a number or nested, not text",
    "caption_not_utf8": "the caption is no text: write it as UTF-8",
    "caption_json": "the json can't be read, or is no object",
    "caption_binary": "zero bytes in the caption",
    "caption_too_long": "more than a megabyte of caption",
}
WARNINGS = {
    "hostile_name", "link", "executable", "no_index", "stale_index", "key_twice", "same_media", "variable_rate",
    "careful", "sequential", "hdr", "interlaced", "pixel_aspect", "still", "ignored_field",
}  # fmt: skip
_EXECUTABLE = ("pkl", "pickle", "pyd", "pth", "pt", "ckpt", "dill", "joblib", "gz", "zip", "exe", "so", "py", "sh")


@dataclass
class Findings:
    """Faults found, by shard and cause."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    examples: dict[tuple[str, str], list[str]] = field(default_factory=lambda: defaultdict(list))
    samples: int = 0
    usable: int = 0

    def add(self, shard: str, cause: str, what: str) -> None:
        """Record one fault; `what` names the sample or the member."""
        self.counts[shard, cause] += 1
        self.examples[shard, cause].append(what)

    @property
    def errors(self) -> int:
        """Number of faults that lose samples."""
        return sum(count for (_, cause), count in self.counts.items() if cause not in WARNINGS)

    def as_json(self, examples: int) -> dict[str, Any]:
        """The findings as JSON values, with at most `examples` examples of each fault."""
        faults = [
            {
                "shard": shard,
                "cause": cause,
                "severity": "warning" if cause in WARNINGS else "error",
                "count": count,
                "meaning": MEANING.get(cause, ""),
                "examples": self.examples[shard, cause][:examples],
            }
            for (shard, cause), count in self.counts.most_common()
        ]
        return {"samples": self.samples, "usable": self.usable, "errors": self.errors, "faults": faults}


@dataclass
class Options:
    """Command-line options, apart from the paths of shards."""

    format: str = choice(("table", "json"), "table")
    examples: int = number(3, least=0)
    probe: Probe = Probe.all


def main() -> int:
    """Check the shards named on the command line."""
    o, patterns = options_and_paths(Options, __doc__)
    if not patterns:
        raise InputError("no shard given; --help shows how to name them")
    store = Store.of(DataConfig())
    found = lint(expand(patterns, store), store, o.probe)
    if o.format == "json":
        print(json.dumps(found.as_json(o.examples), indent=1))
    else:
        _print(found, o.examples)
    return 1 if found.errors else 0


def lint(shards: list[str], store: Store, probe: Probe = Probe.all) -> Findings:
    """Check every shard, and look for keys and media that are repeated across shards."""
    found = Findings()
    keys: dict[str, str] = {}
    media: dict[tuple[int, int], str] = {}
    with Pool(len(os.sched_getaffinity(0))) as pool, progress(len(shards), "checking shards") as advance:
        for shard in shards:
            with store.local(shard) as path:
                _members(shard, path, found)
                scan = scan_shard(str(path), pool, probe)
            rows = scan.table.to_pylist()
            for name, why in scan.ignored.items():
                found.add(shard, "ignored_field", f"{name}: {why}")
            _rows(shard, rows, found)
            _index(shard, store, rows, found)
            for row in rows:
                name = f"{shard}:{row['key']}"
                if row["key"] and keys.setdefault(row["key"], shard) != shard:
                    found.add(shard, "key_twice", f"{row['key']}, also in {keys[row['key']]}")
                if row["crc32"] and media.setdefault((row["size"], row["crc32"]), name) != name:
                    found.add(shard, "same_media", f"{row['key']}, as {media[row['size'], row['crc32']]}")
            advance(1)
    return found


def _members(shard: str, path: Path, found: Findings) -> None:
    """Check the names and the order of the members."""
    finished: set[str] = set()
    current = ""
    with path.open("rb") as file:
        for member in walk(file, others=True):
            if isinstance(member, Fault):
                continue  # `_rows` reports it
            if member.kind != "file":
                found.add(shard, "link", member.name)
                continue
            key, parts = _split(member)
            if key != current:
                if key in finished:
                    found.add(shard, "interleaved", member.name)
                finished.add(current)
                current = key
            if member.name.startswith("/") or ".." in member.name.split("/"):
                found.add(shard, "hostile_name", member.name)
            if parts[-1] in _EXECUTABLE:
                found.add(shard, "executable", member.name)
            if len(parts) > 1 and parts[-1] in VIDEOS + IMAGES + CAPTIONS and not _is_further(parts):
                found.add(shard, "dots_in_name", member.name)


def _split(member: Member) -> tuple[str, list[str]]:
    folder, _, name = member.name.rpartition("/")
    stem, *parts = name.split(".")
    return f"{folder}/{stem}", [part.lower() for part in parts] or [""]


def _is_further(parts: list[str]) -> bool:
    """Tell whether the file is a further one of a sample, `KEY.ref0.mp4`: one identifier before the extension."""
    return len(parts) == 2 and parts[0].isidentifier()


def _rows(shard: str, rows: list[dict[str, Any]], found: Findings) -> None:
    """Check the samples by their rows of a new scan."""
    found.samples += sum(bool(row["key"]) for row in rows)
    found.usable += sum(not row["refused"] for row in rows)
    if not any(row["key"] for row in rows):
        found.add(shard, "no_samples", "")
    for row in rows:
        if row["refused"]:
            found.add(shard, row["refused"], f"{row['key'] or 'the tar'}: {row['detail']}")
            continue
        video = row["extension"] in VIDEOS
        for cause, holds in (
            ("variable_rate", row["vfr"]), ("careful", row["careful"]), ("still", video and row["frames"] == 1),
            ("sequential", row["sequential"]), ("hdr", row["transfer"]), ("interlaced", row["interlaced"]),
            ("pixel_aspect", video and not 0.99 < row["pixel_aspect"] < 1.01),
        ):  # fmt: skip
            if holds:
                found.add(shard, cause, row["key"])


def _index(shard: str, store: Store, rows: list[dict[str, Any]], found: Findings) -> None:
    """Check that the index belongs to this shard, and compare its checksums with those of a new scan, `rows`."""
    try:
        current, there = is_current(shard, store), index_path(shard, store).is_file()
    except InputError as error:
        found.add(shard, "foreign_index", str(error))
        return
    if not current:
        found.add(shard, "stale_index" if there else "no_index", str(index_path(shard, store)))
        return
    now = {row["key"]: row for row in rows}
    for row in load_rows(shard, store).to_pylist():
        other = now.get(row["key"])
        if other is None:
            found.add(shard, "checksum", f"{row['key']} is indexed and not in the shard")
        elif not row["refused"]:
            changed = [n for n in ("crc32", "caption_crc32", "more") if row[n] != other[n]]
            if changed:
                found.add(shard, "checksum", f"{row['key']}: {', '.join(changed)}")


def _print(found: Findings, examples: int) -> None:
    console = Console()
    if found.counts:
        table = Table("shard", "cause", "count", "for example", "what it means")
        for fault in found.as_json(examples)["faults"]:
            colour = "yellow" if fault["severity"] == "warning" else "red"
            shown = "\n".join(str(example)[:100] for example in fault["examples"])
            cells = (Path(fault["shard"]).name, fault["cause"], str(fault["count"]), shown, fault["meaning"])
            table.add_row(*(escape(cell) for cell in cells), style=colour)
        console.print(table)
    warnings = found.counts.total() - found.errors
    console.print(f"{found.usable} of {found.samples} samples usable; {found.errors} errors, {warnings} warnings")


if __name__ == "__main__":
    run(main)
