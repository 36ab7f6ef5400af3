"""Finds the demo world's objects in pixels, without any learned part.

Objects are saturated, backgrounds are grey: an object is a connected region of saturated pixels, its colour the
nearest hue, its shape the outline it overlaps best, its direction the way its centre goes. All thresholds are
shares of the frame, so that the same video is seen the same at every resolution.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image
from scipy import ndimage
from scipy.signal import fftconvolve

from sora_train.demo_world.render import coverage
from sora_train.demo_world.scenes import COLOURS, DIRECTIONS, SHAPES

_SATURATED = 60  # of 255: lowest difference between an object pixel's strongest and weakest channel
_SMALLEST = 0.008  # of the frame's area: smaller regions are noise; the smallest whole object covers 0.018
_SHORTEST = 0.04  # of the frame's shorter side: a smaller displacement is none; the slowest object goes 0.06
_JUMP = 0.5  # of the whole way: an object that covers more of it from one sighting to the next did not move there
_FINE_SIDE = 96  # smaller frames are enlarged to about this shorter side
_TOUCH = 0.04  # of the shorter side: objects nearer than this may hide each other's soft edges
_EDGE = 2.0  # pixels of the frame: the width of an object's soft edge, through a codec or a VAE
_FAINT = 0.1  # of an object's strength: less is background
_PART_SIDE = 48  # cut or covered outlines are fitted on a frame reduced to about this many pixels a side
_RADII = tuple(0.01 * i for i in range(9, 25))  # of the shorter side: sizes tried in that fit
_LIKELY = (0.9, 2.2)  # times the region's pixels: what an outline of which it may be the visible part covers


@dataclass(frozen=True)
class Sighting:
    """One object as seen in one frame: its centre and size in pixels, its colour and shape by name."""

    y: float
    x: float
    pixels: int
    colour: str
    overlaps: tuple[float, ...]  # with the best-fitting outline of each of SHAPES, 0 to 1
    whole: bool  # neither cut by the frame's edge nor touching another object

    @property
    def shape(self) -> str:
        """The shape it overlaps best."""
        return shape_of([self])


def sight(frame_HWC: np.ndarray) -> list[Sighting]:
    """The saturated objects of one uint8 RGB frame `(H, W, 3)`, largest first."""
    scale = max(1, round(_FINE_SIDE / min(frame_HWC.shape[:2])))
    pixels = _enlarged(frame_HWC, scale).astype(np.int16)
    strength = pixels.max(-1) - pixels.min(-1)
    saturated = strength > _SATURATED
    if not saturated.any():
        return []
    hues = _nearest_colour(pixels)
    regions = []
    for colour in range(len(COLOURS)):
        labels, count = ndimage.label(saturated & (hues == colour))
        for index in range(1, count + 1):
            region = labels == index
            region &= strength > strength[region].max() / 2  # a soft edge ends half way up
            if region.sum() >= _SMALLEST * region.size:
                regions.append((colour, region))
    everything = np.logical_or.reduce([region for _, region in regions]) if regions else saturated
    found = [_sighting(colour, region, everything & ~region, strength, scale) for colour, region in regions]
    return sorted(found, key=lambda s: -s.pixels)


def shape_of(sightings: list[Sighting]) -> str:
    """The shape that several sightings of one object overlap best on average: surer than any frame by itself."""
    return SHAPES[int(np.mean([s.overlaps for s in sightings], axis=0).argmax())]


def direction_of(track: list[Sighting], side: int) -> str | None:
    """The way a tracked object went, by the larger part of its displacement.

    None if it stood still (went less than 0.04 of the frame's shorter side, `side` pixels) or jumped there.
    """
    if len(track) < 2:
        return None
    at = np.array([(s.y, s.x) for s in track])
    way = at[-1] - at[0]
    along = int(np.abs(way).argmax())
    if abs(way[along]) < _SHORTEST * side:
        return None
    if len(track) > 2 and np.abs(np.diff(at[:, along])).max() > _JUMP * abs(way[along]):
        return None
    step = (int(np.sign(way[0])), 0) if along == 0 else (0, int(np.sign(way[1])))
    return next(name for name, one in DIRECTIONS.items() if one == step)


def _enlarged(frame_HWC: np.ndarray, scale: int) -> np.ndarray:
    """The frame with sides `scale` times as long: soft edges then tell outlines of few pixels apart."""
    if scale == 1:
        return frame_HWC
    height, width = frame_HWC.shape[:2]
    return np.asarray(Image.fromarray(frame_HWC).resize((width * scale, height * scale), Image.Resampling.BICUBIC))


def _sighting(
    colour: int, region_HW: np.ndarray, others_HW: np.ndarray, strength_HW: np.ndarray, scale: int
) -> Sighting:
    """Describe one region of a frame enlarged by `scale`; `others_HW` marks what may hide part of it."""
    ys, xs = np.nonzero(region_HW)
    top, bottom, left, right = ys.min(), ys.max(), xs.min(), xs.max()
    cut = top == 0 or left == 0 or bottom == region_HW.shape[0] - 1 or right == region_HW.shape[1] - 1
    reach = round(_TOUCH * min(region_HW.shape))
    near = others_HW[max(top - reach, 0) : bottom + reach + 1, max(left - reach, 0) : right + reach + 1]
    whole = not cut and not near.any()
    if whole:
        edge = ndimage.binary_dilation(region_HW, iterations=round(_EDGE * scale))
        alpha = np.clip(strength_HW / np.quantile(strength_HW[region_HW], 0.9), 0.0, 1.0)
        overlaps = _overlaps_whole(np.where(edge & (alpha >= _FAINT), alpha, 0.0), scale)
    else:
        overlaps = _overlaps_part(region_HW, others_HW)
    y, x = (float(at.mean() + 0.5) / scale - 0.5 for at in (ys, xs))
    return Sighting(y, x, max(1, len(ys) // scale**2), list(COLOURS)[colour], overlaps, whole)


def _nearest_colour(pixels_HWC: np.ndarray) -> np.ndarray:
    """Index of the vocabulary colour with the nearest hue, for every pixel."""
    names = np.array(list(COLOURS.values()), dtype=np.float64)
    differences = np.abs(_hue(pixels_HWC)[..., None] - _hue(names))
    return np.asarray(np.minimum(differences, 6.0 - differences).argmin(-1))


def _hue(rgb: np.ndarray) -> np.ndarray:
    """Hue in [0, 6), the hexagonal formula; 0 for grey."""
    rgb = rgb.astype(np.float64)
    high, low = rgb.max(-1), rgb.min(-1)
    spread = np.maximum(high - low, 1e-9)
    red, green, blue = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    below_red = np.where(high == green, (blue - red) / spread + 2.0, (red - green) / spread + 4.0)
    hue = np.where(high == red, (green - blue) / spread % 6.0, below_red)
    return np.where(high == low, 0.0, hue)


def _overlaps_whole(alpha_HW: np.ndarray, scale: int) -> tuple[float, ...]:
    """Overlap (sum of the lesser over sum of the greater) of an object with each shape of its area and centre of mass.

    `alpha_HW` says how much of each pixel it covers, 0 to 1. Moments stay what they are where a blur takes a tip away,
    the box around it doesn't.
    """
    ys, xs = np.arange(alpha_HW.shape[0])[:, None], np.arange(alpha_HW.shape[1])[None, :]
    mass = alpha_HW.sum()
    y, x = (alpha_HW * ys).sum() / mass, (alpha_HW * xs).sum() / mass
    soft = _EDGE * scale
    overlaps = []
    for shape in SHAPES:
        area, middle = _moments(shape)
        radius = np.sqrt(mass / area)
        outline = coverage(shape, (ys - y + middle * radius) / soft, (xs - x) / soft, radius / soft)
        overlaps.append(float(np.minimum(outline, alpha_HW).sum() / np.maximum(outline, alpha_HW).sum()))
    return tuple(overlaps)


@cache
def _moments(shape: str) -> tuple[float, float]:
    """Area of a shape of radius 1, and how far below its centre its centre of mass lies."""
    at = np.linspace(-1.2, 1.2, 961)
    covered = coverage(shape, at[:, None] * 400.0, at[None, :] * 400.0, 400.0)
    return float(covered.sum()) * (at[1] - at[0]) ** 2, float((covered * at[:, None]).sum() / covered.sum())


def _overlaps_part(region_HW: np.ndarray, others_HW: np.ndarray) -> tuple[float, ...]:
    """The same for a region of which other objects or the edge hide a part: the best over all places and sizes.

    Where it is hidden an outline counts neither for nor against.
    """
    stride = max(1, round(min(region_HW.shape) / _PART_SIDE))
    reach = round(_TOUCH * min(region_HW.shape) / 2)
    hidden = ndimage.binary_dilation(others_HW, iterations=reach) & ~region_HW
    region, hidden = region_HW[::stride, ::stride], hidden[::stride, ::stride]
    if not region.any():  # thinner than the stride: no shape at all
        return (0.0,) * len(SHAPES)
    side = min(region.shape)
    room = int(max(_RADII) * side) + 2
    box = ndimage.find_objects(region.astype(int))[0]
    around = tuple(slice(one.start, one.stop + 2 * room) for one in box)  # the box and `room` each way, once padded
    seen = np.pad(region, room)[around].astype(np.float64)
    visible = np.pad(~hidden, room)[around].astype(np.float64)
    best = []
    for shape in SHAPES:
        overlaps = [0.0]
        for radius in _RADII:
            outline = _outline(shape, radius * side)[::-1, ::-1]
            if not _LIKELY[0] <= outline.sum() / seen.sum() <= _LIKELY[1]:
                continue
            common = fftconvolve(seen, outline, mode="same")
            union = seen.sum() + fftconvolve(visible, outline, mode="same") - common
            overlaps.append(float((common / np.maximum(union, 1.0)).max()))
        best.append(max(overlaps))
    return tuple(best)


@cache
def _outline(shape: str, radius: float) -> np.ndarray:
    """A shape of this radius in pixels, in the middle of an odd-sided patch."""
    reach = int(np.ceil(radius)) + 1
    at = np.arange(-reach, reach + 1, dtype=np.float64)
    return coverage(shape, at[:, None], at[None, :], radius)
