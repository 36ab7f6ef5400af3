"""Scenes of the demo world as pixels."""

from __future__ import annotations

import numpy as np

from sora_train.demo_world.scenes import BACKGROUNDS, COLOURS, SHAPES, SIZES, Scene, Thing


def render(scene: Scene) -> np.ndarray:
    """The frames of a scene, `(T, H, W, 3)` uint8."""
    side = min(scene.height, scene.width)
    shade = BACKGROUNDS[scene.background] + 10.0 * ((np.arange(scene.height) + 0.5) / scene.height - 0.5)
    video = np.empty((scene.frames, scene.height, scene.width, 3), np.uint8)
    video[:] = shade.round().astype(np.uint8)[:, None, None]
    times = np.linspace(0.0, 1.0, scene.frames)
    for thing in scene.things:
        at, ys, xs = np.array(thing.path).T
        _draw(video, thing, np.interp(times, at, ys) * side, np.interp(times, at, xs) * side, SIZES[thing.size] * side)
    return video


def coverage(shape: str, dy: np.ndarray, dx: np.ndarray, radius: float) -> np.ndarray:
    """Share of each pixel that a shape covers, 0 to 1, at offsets (dy, dx) from its centre; all in pixels.

    Raises ValueError for an unknown shape.
    """
    ay, ax = np.abs(dy), np.abs(dx)
    if shape == "ring":
        distance = np.abs(np.hypot(dy, dx) - 0.72 * radius) - 0.28 * radius
    elif shape == "square":
        distance = np.maximum(ay, ax) - 0.9 * radius
    elif shape == "triangle":  # tip up
        distance = np.maximum(dy - 0.85 * radius, (2.0 * ax - dy - 0.95 * radius) / np.sqrt(5.0))
    elif shape == "cross":
        distance = np.minimum(np.maximum(ay - 0.34 * radius, ax - radius), np.maximum(ax - 0.34 * radius, ay - radius))
    else:
        raise ValueError(f"no shape {shape!r}; there are {SHAPES}")
    return np.clip(0.5 - distance, 0.0, 1.0)


def _draw(video_THWC: np.ndarray, thing: Thing, ys: np.ndarray, xs: np.ndarray, radius: float) -> None:
    """Blend one object into all frames; only the box around it is touched."""
    reach = int(np.ceil(radius)) + 2
    tops, lefts = np.floor(ys).astype(int) - reach, np.floor(xs).astype(int) - reach
    box = np.arange(2 * reach + 1, dtype=np.float32) + 0.5
    dy = (box + (tops - ys).astype(np.float32)[:, None])[:, :, None]
    dx = (box + (lefts - xs).astype(np.float32)[:, None])[:, None, :]
    alphas = coverage(thing.shape, dy, dx, radius).astype(np.float32)[..., None]
    colour = np.array(COLOURS[thing.colour], np.float32)
    height, width = video_THWC.shape[1:3]
    for frame, top, left, alpha in zip(video_THWC, tops, lefts, alphas, strict=True):
        y0, y1 = max(top, 0), min(top + len(box), height)
        x0, x1 = max(left, 0), min(left + len(box), width)
        if y0 >= y1 or x0 >= x1:
            continue  # out of the frame
        below = frame[y0:y1, x0:x1].astype(np.float32)
        cover = alpha[y0 - top : y1 - top, x0 - left : x1 - left]
        frame[y0:y1, x0:x1] = (below + cover * (colour - below) + 0.5).astype(np.uint8)
