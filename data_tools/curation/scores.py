"""The stage `scores`: figures of each shot, from the results of the stage `look`; no video is decoded.

| score | meaning |
| --- | --- |
| motion | mean speed of the optical flow, in diagonals a second (median over the clip) |
| sharpness | variance of the Laplacian at a short side of 256 pixels (median) |
| noise | standard deviation of the noise in the frames at full size, levels of 255 (median) |
| luma | mean brightness, 0 to 1 |
| black, white | share of the small pictures that are black, or white |
| frozen | share of frames that show the same as the one before |
| overlay | share of the picture with edges that stay while the rest moves: logos, subtitles; NaN if little moves |
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from data_tools.curation.hashes import hashes_of, to_text
from data_tools.curation.stage import Item, Stage

COLUMNS = ("motion", "sharpness", "noise", "luma", "black", "white", "frozen", "overlay")
_BLACK, _WHITE, _NEARLY = 24, 232, 0.98
_EDGE = 40.0  # least gradient of an edge, levels per pixel
_MOVES = 0.02  # least motion to detect overlays, diagonals a second: with less, every edge stays
_LEAST = 4  # least number of pictures to detect overlays
_READS = ("look", "shots", "height", "width")
_MODULES = ("data_tools.curation.scores", "data_tools.curation.hashes")


def stage() -> Stage:
    """Build the stage `scores`."""
    return Stage("scores", scores, _READS, _MODULES)


def scores(item: Item, parameters: Mapping[str, Any], folder: Path) -> Item:
    """Compute the scores and hashes of each shot that wasn't dropped; None for the others."""
    cv2.setNumThreads(1)
    seen = np.load(folder.parent / "look" / item["look"])
    arrays = {name: seen[name] for name in ("at", "small", "tiny", "figures")}
    return {"scores": [None if shot["reason"] else _of_shot(shot, arrays, item) for shot in item["shots"]]}


def _of_shot(shot: Item, seen: Mapping[str, np.ndarray], item: Item) -> Item:
    first, end = shot["start"], shot["end"]
    inside = (seen["at"] >= first) & (seen["at"] < end)
    small_SHW, figures = seen["small"][inside], seen["figures"][inside]
    tiny_THW = seen["tiny"][first:end].astype(np.int16)
    values = dict(zip(("motion", "sharpness", "noise"), _medians(figures), strict=True))
    values |= {
        "luma": float(small_SHW.mean() / 255),
        "black": float(np.mean([np.quantile(one, _NEARLY) <= _BLACK for one in small_SHW])),
        "white": float(np.mean([np.quantile(one, 1 - _NEARLY) >= _WHITE for one in small_SHW])),
        "frozen": float((np.abs(np.diff(tiny_THW, axis=0)).max(axis=(1, 2)) == 0).mean()),
        "overlay": _overlay(small_SHW) if values["motion"] >= _MOVES and len(small_SHW) >= _LEAST else np.nan,
    }
    pictures = [without_border(one, shot["border"], item) for one in small_SHW]
    both = [hashes_of(one) for one in pictures]
    return {
        **{name: None if np.isnan(value) else round(value, 6) for name, value in values.items()},
        "hashes": to_text([one for one, _ in both]), "mirrored_hashes": to_text([other for _, other in both]),
        "picture": int(np.flatnonzero(inside)[len(both) // 2]),
    }  # fmt: skip


def _medians(figures_SF: np.ndarray) -> list[float]:
    """The median of each figure over the pictures that have it."""
    found = [column[~np.isnan(column)] for column in figures_SF.T]
    return [float(np.median(column)) if len(column) else np.nan for column in found]


def _overlay(small_SHW: np.ndarray) -> float:
    sizes = []
    for picture in small_SHW:
        blurred = picture.astype(np.float32)
        sizes.append(np.hypot(cv2.Sobel(blurred, -1, 1, 0) / 4, cv2.Sobel(blurred, -1, 0, 1) / 4))
    return float((np.min(sizes, axis=0) > _EDGE).mean())


def without_border(small: np.ndarray, border: list[int], item: Item) -> np.ndarray:
    """A small picture, `(H, W)` or `(H, W, C)`, without its border, which is given in pixels of the film."""
    height, width = small.shape[:2]
    top, bottom = (round(pixels * height / item["height"]) for pixels in border[:2])
    left, right = (round(pixels * width / item["width"]) for pixels in border[2:])
    return np.ascontiguousarray(small[top : height - bottom, left : width - right])
