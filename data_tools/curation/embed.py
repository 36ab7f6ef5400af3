"""The stage `embed`: a feature vector of each clip by a network of the user, from the thumbnails of its film.

No video is decoded. Clips with nearly parallel vectors show the same, even if their hashes differ because of cropping,
overlays, other colours or another camera angle.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_tools.curation.scores import without_border
from data_tools.curation.stage import Item, Stage
from data_tools.model_scores import Embedder, embedder_of

_PICTURES = 4  # of a clip, evenly spaced
_READS = ("look", "start", "end", "border", "height", "width")
_MODULES = ("data_tools.curation.embed", "data_tools.model_scores")


def stage(folder: str) -> Stage:
    """Build the stage for the network of a folder. Raises InputError if the folder has none."""
    place = str(Path(folder).absolute())
    return Stage("embed", embed, _READS, _MODULES, {"folder": place, "network": _network(place).hash})


def embed(item: Item, parameters: Mapping[str, Any], folder: Path) -> Item:
    """Compute a clip's vector: the direction of the mean of its pictures' unit vectors."""
    seen = np.load(folder.parent / "look" / item["look"])
    places = np.flatnonzero((seen["at"] >= item["start"]) & (seen["at"] < item["end"]))
    chosen = places[np.unique(np.linspace(0, len(places) - 1, _PICTURES).round().astype(int))]
    ends = [0, *seen["thumbnail_ends"].tolist()]
    data = seen["thumbnails"].tobytes()
    pictures = [Image.open(io.BytesIO(data[ends[place] : ends[place + 1]])).convert("RGB") for place in chosen]
    inner = np.stack([without_border(np.asarray(one), item["border"], item) for one in pictures])
    return {"vector": to_text(_mean_direction(_network(parameters["folder"]).vectors(inner)))}


def to_text(vector: np.ndarray) -> str:
    """Encode a vector as text: base64 of half precision."""
    return base64.b64encode(vector.astype("<f2").tobytes()).decode()


def from_text(text: str) -> np.ndarray:
    """Decode a vector from its text, and normalise it to length 1."""
    vector = np.frombuffer(base64.b64decode(text), "<f2").astype(np.float32)
    return np.asarray(vector / max(float(np.linalg.norm(vector)), 1e-9))


def _mean_direction(vectors_TD: np.ndarray) -> np.ndarray:
    unit_TD = vectors_TD / np.maximum(np.linalg.norm(vectors_TD, axis=1, keepdims=True), 1e-9)
    mean_D = unit_TD.mean(axis=0)
    return np.asarray(mean_D / max(float(np.linalg.norm(mean_D)), 1e-9))


@cache
def _network(folder: str) -> Embedder:
    """Load the network of a folder, once per process."""
    return embedder_of("near_model", folder)
