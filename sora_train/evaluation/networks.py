"""Metrics based on networks in local folders, given by `models={NAME: FOLDER}`. Nothing is downloaded.

`clip` (CLIP or X-CLIP of transformers) for text alignment, `image` (DINO, CLIP or another image model of transformers)
for subject consistency, `video` (VideoMAE, V-JEPA or another video model of transformers, or an I3D as TorchScript that
takes `rescale`, `resize` and `return_features`) for distances.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sora_train.core.cli import InputError
from sora_train.core.pixels import to_video
from sora_train.evaluation.distances import distance_on
from sora_train.evaluation.metric import Distance, Metric, Models, Sample, Unavailable, register
from sora_train.evaluation.motion import likeness

_FRAMES = 16  # of a video that an image model gets, at most
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, for a folder without these values


class _Network:
    """A transformers model from a folder, with the size and normalisation of its input pictures."""

    def __init__(self, folder: str) -> None:
        try:
            from transformers import AutoModel
        except ImportError as error:
            raise Unavailable("needs transformers (pip install -e '.[models]')") from error
        try:
            self.model: Any = AutoModel.from_pretrained(folder, local_files_only=True).eval().requires_grad_(False)
        except (OSError, ValueError) as error:
            raise InputError(f"models: {folder} holds no model: {str(error).splitlines()[0]}") from error
        config = self.model.config
        self.vision = getattr(config, "vision_config", config)
        path = Path(folder) / "preprocessor_config.json"
        asked = json.loads(path.read_text()) if path.is_file() else {}
        mean, std = (asked.get(f"image_{key}", value) for key, value in (("mean", _MEAN), ("std", _STD)))
        self.mean, self.std = (torch.tensor(value).view(3, 1, 1) for value in (mean, std))
        size: Any = getattr(self.vision, "image_size", None) or getattr(self.vision, "crop_size", 224)
        self.side = int(size if isinstance(size, int) else size[0])

    def pictures(self, video_THWC: np.ndarray, frames: int) -> Tensor:
        """Resize and normalise `frames` evenly spaced frames: `(T, 3, S, S)`. A shorter video's frames are repeated."""
        places = np.linspace(0, len(video_THWC) - 1, frames).round().astype(int)
        video = to_video(np.ascontiguousarray(video_THWC[places])).float() / 255
        small = F.interpolate(video, (self.side, self.side), mode="bicubic", antialias=True)
        return (small.clamp(0, 1) - self.mean) / self.std


def _vectors(output: Any) -> Tensor:
    """Pool a model's output to one vector `(N, D)` per input."""
    if isinstance(output, Tensor):
        return output
    pooled = getattr(output, "pooler_output", None)
    return pooled if pooled is not None else output.last_hidden_state.mean(1)


def _build_text(models: Models) -> Metric:
    network = _Network(_folder(models, "clip"))
    try:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(models["clip"], local_files_only=True)
    except (OSError, ValueError) as error:
        raise InputError(f"models.clip={models['clip']} has no tokenizer: {str(error).splitlines()[0]}") from error
    of_videos = hasattr(network.model, "get_video_features")

    @torch.no_grad()
    def figures(made_THWC: np.ndarray, real_THWC: np.ndarray | None, sample: Sample) -> dict[str, float]:
        """Cosine similarity of a caption's features with those of the video, or the mean over its frames."""
        text = tokenizer([sample.caption], return_tensors="pt", truncation=True, padding=True)
        wanted = F.normalize(_vectors(network.model.get_text_features(**text)), dim=-1)
        if of_videos:
            pictures = network.pictures(made_THWC, int(network.vision.num_frames)).unsqueeze(0)
            found = _vectors(network.model.get_video_features(pixel_values=pictures))
        else:
            found = _vectors(
                network.model.get_image_features(pixel_values=network.pictures(made_THWC, _few(made_THWC)))
            )
        return {"text_alignment": float((F.normalize(found, dim=-1) @ wanted.T).mean())}

    return Metric("text_alignment", figures, "up", frozenset({"caption"}))


def _build_subject(models: Models) -> Metric:
    network = _Network(_folder(models, "image"))
    of_images = getattr(network.model, "get_image_features", network.model)

    @torch.no_grad()
    def figures(made_THWC: np.ndarray, real_THWC: np.ndarray | None, sample: Sample) -> dict[str, float]:
        """Mean cosine similarity of each frame's features with those of the first and of the previous frame."""
        if len(made_THWC) < 2:
            return {"subject_consistency": float("nan")}
        found = _vectors(of_images(pixel_values=network.pictures(made_THWC, _few(made_THWC))))
        return {"subject_consistency": likeness(found.double().numpy())}

    return Metric("subject", figures, "up")


def _build_video(models: Models) -> Distance:
    place = _folder(models, "video")
    if Path(place).is_file():
        return distance_on("video", _torchscript(place))
    network = _Network(place)
    frames: Any = getattr(network.vision, "num_frames", None) or getattr(network.vision, "frames_per_clip", _FRAMES)
    name = "pixel_values_videos" if "vjepa" in str(network.model.config.model_type) else "pixel_values"

    @torch.no_grad()
    def features(video_THWC: np.ndarray, sample: Sample) -> np.ndarray:
        inputs = {name: network.pictures(video_THWC, int(frames)).unsqueeze(0)}
        return _vectors(network.model(**inputs))[0].double().numpy()

    return distance_on("video", features)


def _torchscript(file: str) -> Any:
    try:
        network = torch.jit.load(file, map_location="cpu").eval()
    except RuntimeError as error:
        raise InputError(f"models.video={file} is no TorchScript: {str(error).splitlines()[0]}") from error

    @torch.no_grad()
    def features(video_THWC: np.ndarray, sample: Sample) -> np.ndarray:
        places = np.linspace(0, len(video_THWC) - 1, max(_FRAMES, len(video_THWC))).round().astype(int)
        video = torch.from_numpy(np.ascontiguousarray(video_THWC[places])).permute(3, 0, 1, 2).float().unsqueeze(0)
        return network(video, rescale=True, resize=True, return_features=True)[0].flatten().double().numpy()

    return features


def _few(video_THWC: np.ndarray) -> int:
    return min(_FRAMES, len(video_THWC))


def _folder(models: Models, name: str) -> str:
    if name not in models:
        raise Unavailable(f"needs a network of yours (models={{{name}: FOLDER}})")
    if not Path(models[name]).exists():
        raise InputError(f"models.{name}={models[name]}: there is no such folder")
    return models[name]


register("text_alignment", ("full",), _build_text)
register("subject", ("full",), _build_subject)
register("video", ("full",), _build_video)
