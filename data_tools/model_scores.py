"""Models that score or embed pictures, from local folders: aesthetics, safety, the share of text, or anything else.

| content of a folder | its columns |
| --- | --- |
| `scores.json` and `model.onnx` or `model.pt` (TorchScript) | those of `scores.json`, from the model's first output |
| an image classifier in the format of transformers | its classes, as probabilities |

`scores.json`: `columns` in the order of the output, `size` (`[pixels]` a side, or `[height, width]`), `mean` and `std`
of the input in 0 to 1, `then` (`none`, `sigmoid` or `softmax` of the output) and `over_frames` (`mean`, `max` or
`min`). For embedding, the first output of such a model is the vector (`columns` isn't needed); an image model in the
format of transformers can be used too. Nothing is downloaded, and no code of a folder is run except TorchScript.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import file_digest
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sora_train.core.cli import InputError
from sora_train.core.options import choice, number, read

_OVER: dict[str, Callable[..., Any]] = {"mean": np.mean, "max": np.max, "min": np.min}
_MODELS = ("model.onnx", "model.pt")
_IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])

Scores = Callable[[np.ndarray], np.ndarray]  # frames (T, H, W, 3) uint8 to scores (T, columns)


@dataclass
class Settings:
    """Content of `scores.json`."""

    columns: list[str] = field(default_factory=list)
    size: list[int] = number([224], least=1)
    mean: list[float] = number(_IMAGENET[0])
    std: list[float] = number(_IMAGENET[1], above=0)
    then: str = choice(("none", "sigmoid", "softmax"), "none")
    over_frames: str = choice(tuple(_OVER), "mean")


@dataclass(frozen=True)
class Scorer:
    """A model, the columns that it gives, and a hash of its files."""

    columns: tuple[str, ...]
    over_frames: str
    hash: str
    scores: Scores

    def of(self, frames_THWC: np.ndarray) -> list[float]:
        """Score a video by some of its frames. Returns a value for each column."""
        found = np.asarray(self.scores(frames_THWC), np.float64)
        return [float(value) for value in _OVER[self.over_frames](found, axis=0)]


def scorer_of(name: str, folder: str) -> Scorer:
    """Load the model of a folder for scoring. Its column is called `name`, or `name_COLUMN` if it has several.

    Raises InputError for a folder without a model.
    """
    path = Path(folder)
    if (path / "scores.json").is_file():
        return _exported(name, path)
    if (path / "config.json").is_file():
        return _classifier(name, path)
    raise InputError(f"models.{name}={folder} holds neither scores.json nor an image classifier's config.json")


@dataclass(frozen=True)
class Embedder:
    """A model that gives vectors, and a hash of its files."""

    hash: str
    vectors: Scores  # frames (T, H, W, 3) uint8 to vectors (T, D)


def embedder_of(option: str, folder: str) -> Embedder:
    """Load the model of a folder for embedding pictures. Raises InputError for a folder without a model.

    `option` is the name of the option that gives the folder, for messages.
    """
    path = Path(folder)
    if (path / "scores.json").is_file():
        run, _, known = _network_of(option, path)
        return Embedder(known, run)
    if (path / "config.json").is_file():
        return _image_model(option, path)
    raise InputError(f"{option}={folder} holds neither scores.json nor an image model's config.json")


def _network_of(option: str, folder: Path) -> tuple[Scores, Settings, str]:
    """Load an exported network. Returns a function from frames to its output `(T, values)`, settings, and a hash."""
    try:
        settings = read(Settings, json.loads((folder / "scores.json").read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / 'scores.json'} is not JSON: {error}") from error
    except InputError as error:
        raise InputError(f"{folder / 'scores.json'}: {error}") from error
    if len(settings.size) > 2 or len(settings.mean) != 3 or len(settings.std) != 3:
        raise InputError(f"{folder / 'scores.json'}: one or two sizes, and three means and deviations are needed")
    file = next((folder / one for one in _MODELS if (folder / one).is_file()), None)
    if file is None:
        raise InputError(f"{option}={folder} holds neither {' nor '.join(_MODELS)}")
    run = _onnx(file) if file.suffix == ".onnx" else _torchscript(file)

    def output(frames_THWC: np.ndarray) -> np.ndarray:
        return run(_prepared(frames_THWC, settings)).reshape(len(frames_THWC), -1).astype(np.float64)

    return output, settings, _hash([file, folder / "scores.json"])


def _exported(name: str, folder: Path) -> Scorer:
    run, settings, known = _network_of(f"models.{name}", folder)
    if not settings.columns:
        raise InputError(f"{folder / 'scores.json'}: columns are needed")

    def scores(frames_THWC: np.ndarray) -> np.ndarray:
        output = run(frames_THWC)
        if output.shape[1] != len(settings.columns):
            raise InputError(
                f"the model in {folder} gives {output.shape[1]} figures, its scores.json names {settings.columns}"
            )
        return _then(output, settings.then)

    return Scorer(_named(name, settings.columns), settings.over_frames, known, scores)


def _prepared(frames_THWC: np.ndarray, settings: Settings) -> np.ndarray:
    """Resize and normalise frames for a network: `(T, 3, height, width)` float32."""
    height, width = settings.size[0], settings.size[-1]
    small = [Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC) for frame in frames_THWC]
    unit = (np.stack([np.asarray(one) for one in small]).astype(np.float32) / 255 - settings.mean) / settings.std
    return np.ascontiguousarray(unit.transpose(0, 3, 1, 2), dtype=np.float32)


def _then(output_TC: np.ndarray, how: str) -> np.ndarray:
    if how == "sigmoid":
        return 1 / (1 + np.exp(-output_TC))
    if how == "softmax":
        powers = np.exp(output_TC - output_TC.max(axis=1, keepdims=True))
        return np.asarray(powers / powers.sum(axis=1, keepdims=True))
    return output_TC


def _onnx(file: Path) -> Scores:
    try:
        import onnxruntime
    except ImportError as error:
        raise InputError(f"{file} needs onnxruntime: pip install -e '.[curate]'") from error
    try:
        session = onnxruntime.InferenceSession(str(file), providers=onnxruntime.get_available_providers())
    except Exception as error:  # onnxruntime's errors have no common base class
        raise InputError(f"{file} is no ONNX model: {str(error).splitlines()[0]}") from error
    name = session.get_inputs()[0].name
    return lambda pictures: np.asarray(session.run(None, {name: pictures})[0])


def _torchscript(file: Path) -> Scores:
    import torch

    try:
        network = torch.jit.load(str(file), map_location="cpu").eval()
    except (RuntimeError, ValueError) as error:
        raise InputError(f"{file} is no TorchScript: {str(error).splitlines()[0]}") from error

    def run(pictures: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            output = network(torch.from_numpy(pictures))
        return np.asarray((output[0] if isinstance(output, tuple) else output).float().numpy())

    return run


def _classifier(name: str, folder: Path) -> Scorer:
    try:
        from transformers import pipeline
    except ImportError as error:
        raise InputError(f"models.{name}={folder} needs transformers: pip install -e '.[models]'") from error
    try:
        network: Any = pipeline("image-classification", model=str(folder), device="cpu")
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise InputError(f"models.{name}={folder} is no image classifier: {str(error).splitlines()[0]}") from error
    labels = [str(label) for _, label in sorted(network.model.config.id2label.items())]

    def scores(frames_THWC: np.ndarray) -> np.ndarray:
        found = network([Image.fromarray(frame) for frame in frames_THWC], top_k=None)
        return np.array(
            [[next(one["score"] for one in of if one["label"] == label) for label in labels] for of in found]
        )

    return Scorer(
        _named(name, labels), "max", _hash(sorted(folder.glob("*.safetensors")) + [folder / "config.json"]), scores
    )


def _image_model(option: str, folder: Path) -> Embedder:
    try:
        import torch
        from transformers import AutoImageProcessor, AutoModel
    except ImportError as error:
        raise InputError(f"{option}={folder} needs transformers: pip install -e '.[models]'") from error
    try:
        prepare: Any = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        network: Any = AutoModel.from_pretrained(folder, local_files_only=True).eval()
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise InputError(f"{option}={folder} is no image model: {str(error).splitlines()[0]}") from error
    of_images = getattr(network, "get_image_features", network)  # of models like CLIP, which take texts too

    def vectors(frames_THWC: np.ndarray) -> np.ndarray:
        pictures = [Image.fromarray(frame) for frame in frames_THWC]
        with torch.inference_mode():
            output = of_images(**prepare(images=pictures, return_tensors="pt"))
        if not isinstance(output, torch.Tensor):
            pooled = getattr(output, "pooler_output", None)
            output = output.last_hidden_state.mean(1) if pooled is None else pooled
        return np.asarray(output.flatten(1).double().numpy())

    return Embedder(_hash(sorted(folder.glob("*.safetensors")) + [folder / "config.json"]), vectors)


def _named(name: str, columns: Sequence[str]) -> tuple[str, ...]:
    """Column names that are valid in filters: `name`, or `name_COLUMN` for each of several columns."""
    if len(columns) == 1:
        return (name,)
    return tuple(f"{name}_{re.sub(r'[^0-9a-z]+', '_', column.lower()).strip('_')}" for column in columns)


def _hash(files: Sequence[Path]) -> str:
    digests = []
    for path in files:
        with path.open("rb") as file:
            digests.append(file_digest(file, "sha256").hexdigest())
    return "-".join(one[:16] for one in digests)
