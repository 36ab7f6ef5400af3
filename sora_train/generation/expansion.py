"""Short prompts rewritten by a language model to the wording of the captions that a video model was trained on."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from sora_train.config.schema import Config
from sora_train.core.chat_server import Server, ServerError
from sora_train.core.cli import InputError
from sora_train.core.model_text import BadText, checked
from sora_train.data.shards import Shards
from sora_train.generation.options import Job, Options
from sora_train.generation.output import has_format

_EXAMPLES, _LONGEST = 6, 600  # captions shown to the language model, and characters of each
_TRIES = 3
_WARMER = 0.7  # temperature of all tries except the first
_TOKENS = 500
_ASK = (
    "Rewrite the prompt below for a model that makes videos from text. Keep everything that it asks for and contradict "
    "none of it; add what else a caption of that video would say, and no more than such captions say. {wording}"
    "Answer with the rewritten prompt alone.\n\nPrompt: {prompt}"
)
_WORDING = "Captions of videos that the model was trained on, whose wording and length to take:\n{examples}\n\n"
_THOUGHTS = re.compile(r"<think>.*?</think>", re.S)  # the reasoning part of an answer

Rewrite = Callable[[str], str]


def expand_all(jobs: Sequence[Job], o: Options, config: Config, ranks: int) -> list[Job]:
    """Rewrite the prompts of jobs with the language model at `o.expand_url`.

    Args:
        jobs: Samples to make, each with a prompt.
        o: Options of the command.
        config: Configuration of the video model, whose training captions serve as examples.
        ranks: Number of ranks; must be 1.

    Returns:
        The jobs with their new prompts. If the JSON of an existing sample shows that it was made from the same prompt,
        its earlier wording is kept.

    Raises:
        InputError: A job has no prompt, there are several ranks, or the server gives no usable answer.
    """
    if ranks > 1:
        raise InputError("expand=true asks a server from one process; take its samples again by from=FILE.json on more")
    if not jobs or any(job.options.prompt is None for job in jobs):
        raise InputError('expand=true rewrites prompt="..." or prompts=FILE; shots and held-out captions stay')
    server = Server(o.expand_url, o.expand_model, option="expand_url")
    try:
        shown = captions_of(config)
        return [_expanded(job, lambda prompt: rewritten(server, prompt, shown)) for job in jobs]
    finally:
        server.close()


def rewritten(server: Server, prompt: str, examples: Sequence[str]) -> str:
    """Rewrite a prompt in the wording of example captions.

    Raises InputError if the server gives no usable answer.
    """
    wording = _WORDING.format(examples="\n".join(f"- {one}" for one in examples)) if examples else ""
    asked, reason = _ASK.format(wording=wording, prompt=prompt), ""
    for number in range(_TRIES):
        try:
            reply = server.ask(asked, (), _WARMER if number else 0.0, _TOKENS)
            if reply.cut_off:
                raise BadText("cut off", reply.text[-80:])
            return checked("short", _THOUGHTS.sub("", reply.text).strip().strip('"'))
        except BadText as error:
            reason = str(error)
        except ServerError as error:
            reason = str(error)
            break  # the server client has retried already
    raise InputError(f"expand_url={server.url} gives no other wording of {prompt[:60]!r}: {reason}")


def captions_of(config: Config) -> list[str]:
    """Return the longest captions of a few samples, spread over the training shards; empty without shards."""
    try:
        shards = Shards(replace(config, data=replace(config.data, validation=[])))
        if not shards.training:
            return []
        index = shards.load(config)
    except InputError:
        return []
    rows = np.flatnonzero(index.usable)
    chosen = rows[np.linspace(0, len(rows) - 1, min(_EXAMPLES, len(rows))).astype(int)].tolist() if len(rows) else []
    longest = (max(index.captions(row)[0], key=len, default="") for row in chosen)
    return [caption[:_LONGEST] for caption in longest if caption]


def _expanded(job: Job, rewrite: Rewrite) -> Job:
    prompt = job.options.prompt or ""
    known = _made_before(job)
    wording = known["prompt"] if known.get("expanded_from") == prompt and "prompt" in known else rewrite(prompt)
    note = f"{job.note}  {wording}".strip()
    return replace(job, options=replace(job.options, prompt=wording, expanded_from=prompt), note=note)


def _made_before(job: Job) -> dict[str, Any]:
    """Options in the JSON of the sample that an earlier command made; empty if there is none."""
    place = job.place.with_suffix("") if has_format(job.place) else job.place
    try:
        found = json.loads(place.with_name(f"{place.name}.json").read_bytes())["options"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}
