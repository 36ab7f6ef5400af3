"""Guard by classifiers of texts and pictures from local folders in the format of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import pipeline

from sora_train.core.cli import InputError
from sora_train.release.verdict import Unavailable, Verdict


class LocalGuard:
    """Guard by a text classifier, an image classifier or both.

    A class is a finding if its score reaches the threshold, unless it is one of the safe classes.
    """

    name = "local"

    def __init__(self, text: Path | None, image: Path | None, threshold: float, safe: set[str]) -> None:
        """Load the classifiers on the CPU.

        Args:
            text: Folder of the text classifier; None: texts aren't checked.
            image: Folder of the image classifier; None: frames aren't checked.
            threshold: Least score of a class that counts, 0 to 1.
            safe: Safe classes, in lower case.

        Raises:
            InputError: A folder contains no such classifier.
        """
        self._text = None if text is None else _load("text-classification", text)
        self._image = None if image is None else _load("image-classification", image)
        self.sees, self._threshold, self._safe = image is not None, threshold, safe

    def text(self, text: str) -> Verdict | None:
        """Classify a text. Returns a finding, or None."""
        if self._text is None:
            return None
        return self._verdict(self._classified(self._text, text, truncation=True))

    def frames(self, frames_THWC: np.ndarray) -> Verdict | None:
        """Classify frames one by one. Returns the first finding, or None."""
        if self._image is None:
            return None
        for frame in frames_THWC:
            verdict = self._verdict(self._classified(self._image, Image.fromarray(frame)))
            if verdict is not None:
                return verdict
        return None

    def _classified(self, classifier: Any, what: Any, **options: Any) -> list[dict[str, Any]]:
        try:
            return list(classifier(what, top_k=None, **options))
        except (RuntimeError, ValueError, IndexError) as error:
            raise Unavailable(str(error)) from error

    def _verdict(self, classes: list[dict[str, Any]]) -> Verdict | None:
        worst = max(
            (one for one in classes if one["label"].lower() not in self._safe),
            key=lambda one: one["score"],
            default=None,
        )
        if worst is None or worst["score"] < self._threshold:
            return None
        return Verdict(str(worst["label"]), self.name, float(worst["score"]))


def _load(task: str, folder: Path) -> Any:
    try:
        return pipeline(task, model=str(folder), device="cpu")
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise InputError(f"{folder} holds no {task} model: {str(error).splitlines()[0]}") from error
