"""A client for servers with OpenAI's chat interface and vision: vLLM, SGLang, `transformers serve` and others.

The API key is read from OPENAI_API_KEY, and is never written to a file or log.
"""

from __future__ import annotations

import base64
import os
import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sora_train.core.cli import InputError

_TRIES = 6  # attempts of a request after errors of network or server
_PAUSE_S, _LONGEST_S = 0.5, 30.0  # pause before the second attempt, doubled for each further one, and its maximum
_GONE = 12  # consecutive requests without a response after which further requests fail at once
_AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)


class ServerError(Exception):
    """A request that failed after all attempts, and may succeed in a later run.

    `kind` is a word or two by which failures are counted, `detail` describes this one.
    """

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind, self.detail = kind, detail


class Refused(ServerError):
    """A request that the server rejects; a further attempt would be rejected too."""


@dataclass(frozen=True)
class Reply:
    """A model's answer, and whether it was truncated at the limit of tokens."""

    text: str
    cut_off: bool


class Server:
    """Client of one server; safe to use from several threads.

    Args:
        url: Base URL, e.g. `http://host:8000/v1`.
        model: Name of the model; None: the first in the server's list.
        timeout_s: Seconds that a response may take.
        pause_s: Seconds before the second attempt of a request.
        option: Option of the command that named the URL, for messages.

    Raises:
        InputError: httpx isn't installed, no server responds, or it doesn't have the model.
    """

    def __init__(
        self, url: str, model: str | None, timeout_s: float = 120.0, pause_s: float = _PAUSE_S, option: str = "captions"
    ) -> None:
        try:
            import httpx
        except ImportError as error:
            raise InputError(f"{option}={url} needs httpx: pip install -e '.[curate]'") from error
        self.url, self._pause_s, self._option = url.rstrip("/"), pause_s, option
        key = os.environ.get("OPENAI_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = httpx.Client(timeout=timeout_s, headers=headers, trust_env=False)
        self._errors: Any = httpx.HTTPError
        self._silent, self._lock = 0, threading.Lock()
        try:
            self.model = self._model(model)
        except InputError:
            self.close()
            raise

    def ask(self, prompt: str, pictures: Sequence[bytes], temperature: float, max_tokens: int) -> Reply:
        """Send a prompt with JPEG pictures (bytes of the files), and return the model's answer. Raises ServerError."""
        parts: list[dict[str, Any]] = [{"type": "text", "text": prompt}]
        for picture in pictures:
            data = base64.b64encode(picture).decode()
            parts.append({"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}})
        body = {
            "model": self.model, "messages": [{"role": "user", "content": parts if pictures else prompt}],
            "temperature": temperature, "max_tokens": max_tokens,
        }  # fmt: skip
        last = ServerError("no answer", "")
        for number in range(_TRIES):
            if self._silent >= _GONE:
                raise ServerError("no answer", f"{self._silent} requests in a row had none")
            try:
                return self._asked(body)
            except Refused:
                raise
            except ServerError as error:
                last = error
            if number + 1 < _TRIES:
                time.sleep(min(_LONGEST_S, self._pause_s * 2**number) * random.uniform(0.5, 1.0))
        raise last

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _asked(self, body: dict[str, Any]) -> Reply:
        try:
            response = self._client.post(f"{self.url}/chat/completions", json=body)
        except self._errors as error:
            with self._lock:
                self._silent += 1
            raise ServerError("no answer", f"{type(error).__name__}: {error}") from error
        with self._lock:
            self._silent = 0
        if response.status_code in _AGAIN:
            raise ServerError("server error", f"{response.status_code} {response.text[:120]!r}")
        if response.status_code != 200:
            raise Refused("refused by the server", f"{response.status_code} {response.text[:200]!r}")
        try:
            choice = response.json()["choices"][0]
            text = choice["message"]["content"]
            if not isinstance(text, str):
                raise TypeError(f"content is {type(text).__name__}")
        except (ValueError, LookupError, TypeError) as error:
            raise ServerError("bad answer", f"{type(error).__name__}: {error}; {response.text[:80]!r}") from error
        return Reply(text, choice.get("finish_reason") == "length")

    def _model(self, model: str | None) -> str:
        where = f"{self._option}={self.url}"
        try:
            response = self._client.get(f"{self.url}/models")
            response.raise_for_status()
            names = [entry["id"] for entry in response.json()["data"]]
        except self._errors as error:
            raise InputError(f"{where}: no server with OpenAI's interface answers ({error})") from error
        except (ValueError, LookupError, TypeError) as error:
            raise InputError(f"{where}: {self.url}/models gives no list of models ({error})") from error
        if model is None and names:
            return str(names[0])
        if model not in names:
            raise InputError(f"{where}: model {model} isn't there; it has {', '.join(map(str, names[:8]))}")
        return str(model)
