"""The stage `captions`: captions of a clip in several lengths, by a vision-language model from some of its frames."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data_tools.curation.caption_text import PROMPT, read_answer
from data_tools.curation.stage import Drop, Fail, Item, Outcome, Stage, attempt
from sora_train.core.chat_server import Refused, Reply, Server, ServerError
from sora_train.core.model_text import BadText

_TRIES = 3  # attempts before a clip is dropped because no answer passes
_WARMER = 0.7  # temperature of all attempts but the first
_TOKENS = 700
_READS = ("key", "digest", "stills")
_MODULES = ("data_tools.curation.captions", "data_tools.curation.caption_text", "sora_train.core.model_text")


class Model(Protocol):
    """A model that answers a prompt with pictures."""

    model: str

    def ask(self, prompt: str, pictures: Sequence[bytes], temperature: float, max_tokens: int) -> Reply:
        """Ask with JPEG pictures, and return the answer. Raises ServerError."""
        ...

    def close(self) -> None:
        """Release the model's resources."""
        ...


def stage(model: Model) -> Stage:
    """Build the stage for a model."""

    def caption(item: Item, parameters: Mapping[str, Any], folder: Path) -> Item:
        with np.load(folder.parent / "cut" / item["stills"]) as stored:
            pictures = [stored[name].tobytes() for name in stored.files]
        return ask_for_captions(model, parameters["prompt"], pictures)

    return Stage("captions", caption, _READS, _MODULES, {"model": model.model, "prompt": PROMPT})


def ask_for_captions(model: Model, prompt: str, pictures: Sequence[bytes]) -> Item:
    """Ask a model until an answer passes, and return its captions and fields.

    Raises Drop if no answer passes, and Fail if the server fails.
    """
    reason = BadText("no caption", "")
    for number in range(_TRIES):
        try:
            reply = model.ask(prompt, pictures, _WARMER if number else 0.0, _TOKENS)
            if reply.cut_off:
                raise BadText("cut off", reply.text[-80:])
            return dict(read_answer(reply.text))
        except BadText as error:
            reason = error
        except Refused as error:
            raise Drop("no caption", str(error)) from error
        except ServerError as error:  # no drop: the same command asks again
            raise Fail(error.kind, error.detail) from error
    raise Drop("no caption", str(reason))


class Threads:
    """Engine of threads, for a stage that waits for a server."""

    def __init__(self, count: int) -> None:
        self._count = count

    def run(self, stage: Stage, items: Sequence[Item], folder: Path) -> Iterator[tuple[int, Outcome]]:
        """Yield each item's number with its outcome as it is done."""
        with ThreadPoolExecutor(self._count) as pool:
            numbers = {pool.submit(attempt, stage, item, folder): number for number, item in enumerate(items)}
            try:
                for future in as_completed(numbers):
                    yield numbers[future], future.result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        """Do nothing: there is nothing to release."""


def is_server(captions: str) -> bool:
    """Tell whether `captions=` is the address of a server."""
    return captions.startswith(("http://", "https://"))


def model_of(captions: str, name: str | None) -> Model:
    """Open the model that `captions=` names: the address of a server, or the folder of a local model."""
    if is_server(captions):
        return Server(captions, name)
    from data_tools.curation.caption_folder import LocalModel

    return LocalModel(captions)
