"""Clips that hashes take for others, cropped ones, are found by the vectors of a network from a local folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from data_tools.curation import embed
from data_tools.curation.clips import without_alike
from data_tools.model_scores import embedder_of
from sora_train.core.cli import InputError
from tests.data_tools.curation import films
from tests.data_tools.curation.outputs import lines, samples


class Colours(torch.nn.Module):
    """A picture as the mean and deviation of its channels."""

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return torch.cat((4 * pictures.mean(dim=[2, 3]), pictures.std(dim=[2, 3])), dim=1)


@pytest.fixture
def network(tmp_path: Path) -> Path:
    """A folder with it."""
    folder = tmp_path / "network"
    folder.mkdir()
    torch.jit.script(Colours()).save(str(folder / "model.pt"))
    (folder / "scores.json").write_text(json.dumps({"size": [48], "mean": [0.5] * 3, "std": [0.25] * 3}))
    return folder


def middle(frames_THWC: np.ndarray) -> np.ndarray:
    """Two thirds of the picture, as large as before: more than hashes see through."""
    height, width = frames_THWC.shape[1:3]
    inner = frames_THWC[:, height // 6 : -(height // 6), width // 6 : -(width // 6)]
    return np.stack([cv2.resize(frame, (width, height)) for frame in inner])


@pytest.mark.campaign
def test_a_cropped_copy_is_found_by_its_vector_alone(
    network: Path, tmp_path: Path, curated: Callable[..., int]
) -> None:
    folder, plain, alike = (tmp_path / name for name in ("footage", "plain", "alike"))
    original = films.shot(11, 48, 0.5)
    films.write(folder / "a.mp4", original)
    films.write(folder / "b.mp4", middle(original))
    films.write(folder / "c.mp4", films.shot(12, 48, 0.5))
    assert curated(folder, plain, "licence=CC0-1.0", "captions=none") == 0 and len(samples(plain)) == 3
    assert curated(folder, alike, "licence=CC0-1.0", "captions=none", f"near_model={network}") == 0
    dropped = lines(alike / "dropped.jsonl")
    assert [(e["reason"], e["film"] in ("a.mp4", "b.mp4")) for e in dropped] == [("alike", True)]
    assert {s["json"]["film"] for s in samples(alike)} | {dropped[0]["film"]} == {"a.mp4", "b.mp4", "c.mp4"}
    assert len(lines(alike / "ledger/embed.jsonl")) == 3


def test_vectors_are_compared_by_their_cosine_and_parts_of_a_shot_stay() -> None:
    def clip(key: str, angle: float, shot: str) -> dict[str, object]:
        vector = embed.to_text(np.array([np.cos(angle), np.sin(angle)]))
        about = {"key": key, "id": key, "vector": vector, "shot": shot, "border": [0, 0, 0, 0]}
        return about | {"height": 9, "width": 9, "start": 0, "end": 9}

    clips = [clip("a", 0.0, "1"), clip("b", 0.3, "2"), clip("c", 0.28, "3"), clip("d", 0.0, "1")]
    kept = {item["key"]: "kept" in outcome for item, outcome in without_alike(clips, [], 0.99)}
    assert kept == {"a": True, "b": True, "c": False, "d": True}, "cosines of 0.955, 0.961 and 0.9998"
    assert [i["key"] for i, o in without_alike(clips, ["c"], 0.99) if "kept" in o] == ["a", "c", "d"]
    assert all("kept" in outcome for _, outcome in without_alike([], [], 0.5))


def test_image_models_as_transformers_saves_them(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    vision = shape | {"image_size": 32, "patch_size": 16}
    transformers.ViTModel(transformers.ViTConfig(**vision)).save_pretrained(tmp_path / "vit")
    text = shape | {"vocab_size": 60, "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1}
    clip = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    transformers.CLIPModel(clip).save_pretrained(tmp_path / "clip")
    frames = np.random.default_rng(0).integers(0, 255, (3, 40, 60, 3), dtype=np.uint8)
    for name, size in (("vit", 16), ("clip", 12)):
        transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / name)
        vectors = embedder_of("near_model", str(tmp_path / name)).vectors(frames)
        assert vectors.shape == (3, size) and np.isfinite(vectors).all()
        assert not np.allclose(vectors[0], vectors[1])
    with pytest.raises(InputError, match="near_model=.* holds neither scores.json nor an image model"):
        embedder_of("near_model", str(tmp_path))


def test_a_folder_without_a_model_is_said_before_anything_is_decoded(
    tmp_path: Path, curated: Callable[..., int]
) -> None:
    films.write(tmp_path / "raw/a.mp4", films.shot(1, 30))
    (tmp_path / "empty").mkdir()
    for option, says in (("near_model", "holds neither scores.json"), ("captions", "neither a server's address nor")):
        with pytest.raises(InputError, match=f"{option}=.*{says}"):
            curated(tmp_path / "raw", tmp_path / "out", "licence=CC0-1.0", f"{option}={tmp_path}/empty")
    assert not (tmp_path / "out/work").exists()
