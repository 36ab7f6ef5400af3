"""Guard model on an OpenAI-compatible server, called through the moderations or the chat API.

Chat answers are parsed in the formats of Llama Guard ("unsafe", then its categories) and Qwen3Guard ("Safety: Unsafe",
"Categories: Violent"). The server's API key is read from the environment (SORA_TRAIN_GUARD_KEY), never from a file.
"""

from __future__ import annotations

import base64
import io
import json
import os
import re
import urllib.error
import urllib.request
from typing import Any

import numpy as np
from PIL import Image

from sora_train.release.verdict import Unavailable, Verdict

KEY = "SORA_TRAIN_GUARD_KEY"
_SIDE = 512  # longest side of a frame that is sent, pixels
_LARGEST = 1 << 20  # bytes of an answer
_SAFE, _UNSAFE = (
    re.compile(r"(?:safety:\s*)?safe\b", re.I),
    re.compile(r"(?:safety:\s*)?(?:unsafe|controversial)\b", re.I),
)


class Endpoint:
    """Guard that sends texts and frames to a server.

    Args:
        url: Base address, such as http://host:port/v1.
        api: `moderations` or `chat`.
        model: The server's name of the model.
        images: Whether the model takes frames too.
        seconds: Time-out of a request.
    """

    name = "endpoint"

    def __init__(self, url: str, api: str, model: str, images: bool, seconds: float) -> None:
        self.url, self.api, self.model, self.sees, self.seconds = url.rstrip("/"), api, model, images, seconds

    def text(self, text: str) -> Verdict | None:
        """Check a text. Returns the server's finding, or None. Raises Unavailable."""
        return self._asked([{"type": "text", "text": text}])

    def frames(self, frames_THWC: np.ndarray) -> Verdict | None:
        """Check frames one by one. Returns the server's first finding, or None. Raises Unavailable."""
        for frame in frames_THWC:
            verdict = self._asked([{"type": "image_url", "image_url": {"url": _jpeg(frame)}}])
            if verdict is not None:
                return verdict
        return None

    def _asked(self, content: list[dict[str, Any]]) -> Verdict | None:
        if self.api == "moderations":
            return _moderation(self._post("moderations", {"model": self.model, "input": content}))
        message = {"role": "user", "content": content if content[0]["type"] != "text" else content[0]["text"]}
        body = {"model": self.model, "messages": [message], "temperature": 0, "max_tokens": 64}
        return _chat(self._post("chat/completions", body))

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(f"{self.url}/{path}", json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=self.seconds) as answer:
                return json.loads(answer.read(_LARGEST))
        except (OSError, ValueError, urllib.error.URLError) as error:
            raise Unavailable(f"{self.url}: {error}") from error


def _moderation(answer: Any) -> Verdict | None:
    try:
        result = answer["results"][0]
        if not isinstance(result["flagged"], bool):
            raise TypeError("flagged is no boolean")
        if not result["flagged"]:
            return None
        categories = [name for name, found in result.get("categories", {}).items() if found]
        scores = result.get("category_scores", {})
        category = max(categories, key=lambda name: scores.get(name, 0.0), default="flagged")
        return Verdict(str(category), Endpoint.name, float(scores.get(category, 1.0)))
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise Unavailable(f"the answer is no moderation ({type(error).__name__}: {error})") from error


def _chat(answer: Any) -> Verdict | None:
    try:
        text = str(answer["choices"][0]["message"]["content"]).strip()
    except (KeyError, IndexError, TypeError) as error:
        raise Unavailable(f"the answer is no chat completion ({type(error).__name__})") from error
    if _UNSAFE.match(text):
        rest = text.splitlines()[1:]
        category = re.sub(r"^categories:\s*", "", rest[0].strip(), flags=re.I) if rest else "unsafe"
        return Verdict(category or "unsafe", Endpoint.name)
    if _SAFE.match(text):
        return None
    raise Unavailable(f"the answer says neither safe nor unsafe: {text[:60]!r}")


def _jpeg(frame_HWC: np.ndarray) -> str:
    image = Image.fromarray(frame_HWC)
    image.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
