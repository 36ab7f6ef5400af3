"""The options of `sample`, and the jobs they describe: from a prompt, a file of prompts, or a sample's JSON file."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sora_train.config.schema import SOLVERS
from sora_train.core.cli import InputError
from sora_train.core.options import MAX_SEED, choice, keys, named, number, options, read
from sora_train.generation.output import FORMATS, has_format
from sora_train.generation.prompt_files import read_rows

FILES = ("image", "video", "end_image", "end_video")
_PATHS = ("run_dir", "vae", "base", *FILES)  # recorded as absolute paths
_OF_THE_COMMAND = {  # the same for all rows of a file of prompts
    "from", "prompts", "run_dir", "vae", "base", "checkpoint", "weights", "lora", "dtype", "rope_scaling",
    "rope_factors", "release", "release.sign", "release.mark", "release.guard", "expand", "expand_url", "expand_model",
}  # fmt: skip
_UNRECORDED = (
    "from", "prompts", "count", "out", "release", "release.sign", "release.mark", "release.guard", "expand",
    "expand_url", "expand_model",
)  # fmt: skip

_LONGEST = 200  # bytes of a sample's name: file systems hold 255, with suffixes


@dataclass
class Options:
    """Command-line options; docs/sampling.md has a table of them."""

    run_dir: str  # a run, an export, or a released pipeline's folder
    source: str | None = named("from", None)  # the JSON beside a sample
    prompt: str | None = None
    negative: str = ""
    shots: str | None = None  # JSON: [{"seconds": 2, "caption": "..."}, ...]
    prompts: str | None = None  # a file of prompts: .txt, .csv, .tsv, .jsonl or .json
    expand: bool = False  # have prompts rewritten to the wording of the training captions
    expand_url: str = "http://localhost:8000/v1"  # of a server with OpenAI's interface, which rewrites them
    expand_model: str | None = None  # its model; default: the first
    expanded_from: str | None = None  # the prompt before it was rewritten; written into the JSON, not for the user
    out: str | None = None
    format: str | None = choice(FORMATS, None)
    fps: float | None = number(None, above=0, most=1000)  # of the file; the frames stay the same
    crf: int | None = number(None, least=0, most=63)
    image: str | None = None
    video: str | None = None
    end_image: str | None = None
    end_video: str | None = None
    strength: float = number(1.0, above=0, most=1)  # below 1: share of noise that `video` starts from
    loop: bool = False  # the end leads back to the beginning
    whole: bool = False  # attend over the whole length at once, however long
    overlap: int = number(2, least=1)  # latent frames that a piece shares with the one before
    memory: bool | None = None  # each piece sees an earlier frame; default: if the run trained the task `memory`
    seconds: float | None = number(None, above=0, most=86400)  # default: the longest trained clip
    height: int | None = number(None, least=1, most=16384)
    width: int | None = number(None, least=1, most=16384)
    seed: int = number(0, least=0, most=MAX_SEED)
    count: int | None = number(None, least=1, most=1_000_000)  # default: one of a prompt, eight of held-out captions
    guidance: float | None = number(None, least=0, most=1000)
    guidance_interval: list[float] | None = number(None, least=0, most=1)
    guidance_rescale: float | None = number(None, least=0, most=1)
    steps: int | None = number(None, least=1, most=10_000)
    solver: str | None = choice(SOLVERS, None)
    shift: float | None = number(None, above=0, most=1000)
    rope_scaling: str | None = None  # interpolation, ntk
    rope_factors: list[float] | None = number(None, least=1)  # of time, height, width
    checkpoint: int | None = number(None, least=0)  # its step; default: the newest intact one
    weights: str = choice(("ema", "raw"), "ema")
    dtype: str = choice(("fp32", "bf16"), "fp32")
    lora: list[str] = number([])  # adapters, each FILE or FILE:WEIGHT
    vae: str | None = None  # new path of the VAE, if it has been moved
    base: str | None = None  # new path of the released weights that the run was trained from, if they have been moved
    release: str | None = None  # the release folder, or off; default: that of this user, if `release init` made one
    sign: bool = named("release.sign", True)
    mark: bool = named("release.mark", True)
    guard: bool = named("release.guard", True)


@dataclass(frozen=True)
class Job:
    """One sample to generate: its options, its path without suffix, and a note for the line that reports it."""

    options: Options
    place: Path
    note: str = ""


@dataclass(frozen=True)
class Recorded:
    """Hashes of weights and given files in the JSON of `from=`, without those that the command line replaces."""

    path: str
    weights: str
    given: dict[str, str]


def parse(usage: str | None) -> tuple[Options, Recorded | None]:
    """Parse the command line. Its options take precedence over those of the JSON file that `from=` names.

    Args:
        usage: Text to print for `--help`.

    Returns:
        The options, and the recorded hashes (None without `from=`).

    Raises:
        InputError: An option or the JSON file is wrong.
    """
    found: list[Recorded] = []

    def beneath(typed: Mapping[str, str]) -> dict[str, Any]:
        """Return the options of the recorded JSON by key, as defaults for those not typed; empty without `from=`."""
        if "from" not in typed:
            return {}
        about = _about(typed["from"])
        anew = {"run_dir", "checkpoint", "weights", "lora", "vae", "base"} & set(typed)
        given = {name: sha for name, sha in about["given"].items() if name not in typed}
        found.append(Recorded(typed["from"], "" if anew else about["weights"], given))
        its = about["options"] | {"out": str(Path(typed["from"]).parent / about["file"])}
        if has_format(typed.get("out", "")):
            its = {key: value for key, value in its.items() if key not in ("format", "crf")}
        return its

    o = options(Options, usage, beneath)
    for one, other in (("image", "video"), ("end_image", "end_video"), ("prompt", "prompts"), ("prompt", "shots"),
                       ("prompts", "shots")):  # fmt: skip
        if getattr(o, one) is not None and getattr(o, other) is not None:
            raise InputError(f"give {one}=... or {other}=..., not both")
    return o, found[0] if found else None


def record(o: Options) -> dict[str, Any]:
    """Return the options of one sample by key, for its JSON file: those that are set, with absolute paths."""
    names = keys(Options)
    values = {names[name]: value for name, value in asdict(o).items() if value is not None}
    for key in _UNRECORDED:
        values.pop(key, None)
    for key in _PATHS:
        if key in values:
            values[key] = str(Path(values[key]).absolute())
    return values


def jobs_of(o: Options) -> list[Job]:
    """List the jobs for a prompt, for shots or for a file of prompts; empty if none of these is given."""
    if o.prompts is not None:
        return _jobs_of_file(o, o.prompts)
    if o.prompt is None and o.shots is None:
        if any(getattr(o, name) is not None for name in FILES):
            raise InputError('what is given needs a prompt="..." too')
        return []
    place = Path(o.out) if o.out is not None else Path(o.run_dir) / "samples" / "prompt" / str(o.seed)
    if o.out is not None and o.out.endswith("/"):  # a folder, not a name in it
        place = place / str(o.seed)
    return copies(o, place)


def copies(o: Options, place: Path) -> list[Job]:
    """Make a job for each of `count` consecutive seeds, with numbered names; a single job for one."""
    if o.count in (None, 1):
        return [Job(o, place)]
    stem, suffix = place.stem, place.suffix
    if not has_format(place):
        stem, suffix = place.name, ""
    count = o.count or 1
    return [Job(replace(o, seed=o.seed + n), place.with_name(f"{stem}-{n}{suffix}")) for n in range(count)]


def _jobs_of_file(o: Options, path: str) -> list[Job]:
    folder = Path(o.out) if o.out is not None else Path(o.run_dir) / "samples" / Path(path).stem
    if has_format(folder) or folder.is_file():
        raise InputError(f"out={o.out} must be a folder, for the samples of prompts={path}")
    names = {key: name for name, key in keys(Options).items()}
    jobs = []
    known = sorted(set(keys(Options).values()) - _OF_THE_COMMAND)
    for n, row in enumerate(read_rows(path, known)):
        try:
            typed = read(Options, {"run_dir": o.run_dir, **row})
        except InputError as error:
            raise InputError(f"{path}: row {n + 1}: {error}") from error
        merged = replace(o, **{names[key]: getattr(typed, names[key]) for key in row})
        if ("prompt" in row) == ("shots" in row):
            raise InputError(f"{path}: row {n + 1} must have a prompt or shots, one of them")
        name = row.get("out", f"{n:04d}")
        if len(os.fsencode(name)) > _LONGEST:
            raise InputError(f"{path}: row {n + 1}: out={name[:20]}... is longer than {_LONGEST} bytes; shorten it")
        if (folder / name).resolve().parent != folder.resolve():
            raise InputError(f"{path}: row {n + 1}: out={name} must be a name within the folder of the samples")
        jobs += copies(merged, folder / name)
    stems = Counter(job.place.with_suffix("") if has_format(job.place) else job.place for job in jobs)
    place, times = stems.most_common(1)[0]
    if times > 1:
        raise InputError(f"{path}: {times} rows have out={place.name}; each needs a name of its own, suffix aside")
    return jobs


def _about(path: str) -> dict[str, Any]:
    """Read the JSON file beside a sample. Raises InputError for any other file."""
    try:
        about = json.loads(Path(path).read_bytes())
        wanted = {"options": dict, "file": str, "weights": str, "given": dict}
        if not all(isinstance(about[key], kind) for key, kind in wanted.items()):
            raise TypeError("options, file, weights and given are of other types")
    except OSError as error:
        raise InputError(f"from={path} can't be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"from={path} is not the JSON that sample writes beside a video ({error})") from error
    return about
