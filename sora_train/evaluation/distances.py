"""Distances between sets of videos: kernel and Frechet distance on the features of a network.

A Frechet distance of few videos is mostly bias: for two sets of 64 from the same source it is far from 0, and it falls
as sets grow. So both distances are reported with the number of videos, and with the distance between two sets of that
many real videos. The kernel distance is listed first, as it is unbiased.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor

from sora_train.core.pixels import to_unit, to_video
from sora_train.evaluation.intervals import Estimate
from sora_train.evaluation.metric import Distance, Models, Sample, register
from sora_train.evaluation.results import REAL, Columns, Judged

_SPLITS = 60  # random halves that a distance is averaged over
_FRAMES, _SIDE = 16, 64  # frames and pixels a side of the fixed network's input
_WIDTHS = (3, 24, 48, 96)
_SEED = 20260101


@dataclass(frozen=True)
class DistanceFigure:
    """Distance of generated from real videos, and of real from other real videos (the floor), for sets of n videos."""

    name: str
    made: Estimate
    floor: Estimate


def kernel_distance(a_ND: np.ndarray, b_ND: np.ndarray) -> float:
    """Squared maximum mean discrepancy of two sets with the kernel (x y / D + 1)^3.

    It is unbiased: 0 on average for two sets from the same distribution.

    M. Binkowski et al., "Demystifying MMD GANs", ICLR 2018 (the kernel inception distance, without its subsets).
    """
    dimensions = a_ND.shape[1]
    within_a, within_b, between = (
        (x @ y.T / dimensions + 1.0) ** 3 for x, y in ((a_ND, a_ND), (b_ND, b_ND), (a_ND, b_ND))
    )
    n, m = len(a_ND), len(b_ND)
    same = (within_a.sum() - np.trace(within_a)) / (n * (n - 1)) + (within_b.sum() - np.trace(within_b)) / (m * (m - 1))
    return float(same - 2.0 * between.mean())


def frechet_distance(a_ND: np.ndarray, b_ND: np.ndarray) -> float:
    """Squared Frechet distance of the Gaussians with the sets' means and covariances; biased upwards for small sets.

    D. Dowson and B. Landau, "The Frechet distance between multivariate normal distributions" (1982). The trace of the
    square root of both covariances' product is the nuclear norm of one's factor times the other's, which is exact
    also where there are fewer videos than features.
    """
    a, b = (x - x.mean(axis=0) for x in (a_ND, b_ND))
    scaled = [np.linalg.qr(x, mode="r") / np.sqrt(len(x) - 1) for x in (a, b)]
    root = np.linalg.svd(scaled[0] @ scaled[1].T, compute_uv=False).sum()
    means = float(((a_ND.mean(axis=0) - b_ND.mean(axis=0)) ** 2).sum())
    return means + float(sum((x**2).sum() for x in scaled) - 2.0 * root)


def set_distances(made_ND: np.ndarray, real_ND: np.ndarray) -> dict[str, float]:
    """Compute both distances by name, the main one first."""
    return {"kernel": kernel_distance(made_ND, real_ND), "frechet": frechet_distance(made_ND, real_ND)}


def between(distance: Distance, made_ND: np.ndarray, real_ND: np.ndarray) -> list[DistanceFigure]:
    """Compute mean distances between random subsets of n videos, where n is half of the smaller set.

    Each of the splits, drawn with a fixed seed, takes n generated videos, n real ones, and n other real ones for the
    floor. The spread over splits is that of the delete-half jackknife, which estimates the error of the distance
    between the full sets (J. Shao and C. Wu, "A general theory for jackknife variance estimation", Annals of Statistics
    17, 1989). Unlike resampling with replacement it puts no video into a set twice.

    Args:
        distance: The distance.
        made_ND: Features of the generated videos.
        real_ND: Features of the real videos.

    Returns:
        A figure for each name of the distance; none for fewer than 8 videos.
    """
    n = min(len(made_ND), len(real_ND)) // 2
    if n < 4:
        return []
    rng = np.random.default_rng(0)
    found: dict[str, list[tuple[float, float]]] = {}
    for _ in range(_SPLITS):
        made, real = rng.permutation(len(made_ND))[:n], rng.permutation(len(real_ND))
        first, other = real_ND[real[:n]], real_ND[real[n : 2 * n]]
        ours, floor = distance.distances(made_ND[made], first), distance.distances(other, first)
        for name, value in ours.items():
            found.setdefault(name, []).append((value, floor[name]))
    return [
        DistanceFigure(
            f"{distance.name}_{name}", *(_spread(np.array(column), n) for column in zip(*values, strict=True))
        )
        for name, values in found.items()
    ]


def _spread(values: np.ndarray, n: int) -> Estimate:
    middle, error = float(values.mean()), 1.959964 * float(values.std(ddof=1))
    return Estimate(middle, middle - error, middle + error, n)


def measure_distances(distances: Sequence[Distance], columns: Columns) -> dict[str, list[DistanceFigure]]:
    """Compute the distances of every column from the real videos, by column; empty without real videos."""
    real = columns.get(REAL, ())
    return {
        column: [f for one in distances for f in between(one, _features(one, videos), _features(one, real))]
        for column, videos in columns.items()
        if column != REAL and real
    }


def _features(distance: Distance, videos: Sequence[Judged]) -> np.ndarray:
    known = [video.features[distance.name] for video in videos if distance.name in video.features]
    return np.array(known, dtype=np.float64).reshape(len(known), -1)


def distances_table(found: Mapping[str, Sequence[DistanceFigure]]) -> Table:
    """Build a table with a line per distance and column, including the floor."""
    out = Table(title="distance from the real videos, less is better")
    for head in ("distance", "videos", "distance (95% interval)", "real from real (floor)", "n"):
        out.add_column(head, justify="left" if head in ("distance", "videos") else "right")
    for column, figures in found.items():
        for figure in figures:
            cells = [f"{e.value:.4g} ({e.low:.3g} to {e.high:.3g})" for e in (figure.made, figure.floor)]
            out.add_row(figure.name.replace("_", " "), column, *cells, str(figure.made.n))
    return out


def distances_json(found: Mapping[str, Sequence[DistanceFigure]]) -> dict[str, Any]:
    """Convert the distances to a map for a JSON file, by figure and column."""
    out: dict[str, Any] = {}
    for column, figures in found.items():
        for figure in figures:
            out.setdefault(figure.name, {})[column] = {**asdict(figure.made), "floor": asdict(figure.floor)}
    return out


class FixedNetwork:
    """A random 3-D convolutional network with the same weights on every machine: features without a download.

    Distances on its features rank simple kinds of damage in the same order as distances on learned features, but they
    are independent of a video's content. Weights are drawn by NumPy, whose generator doesn't change between versions.
    """

    def __init__(self) -> None:
        rng = np.random.default_rng(_SEED)
        self.weights = [
            torch.from_numpy((rng.standard_normal((out, ins, 3, 3, 3)) * (2.0 / (27 * ins)) ** 0.5).astype(np.float32))
            for ins, out in zip(_WIDTHS[:-1], _WIDTHS[1:], strict=True)
        ]

    @torch.no_grad()
    def features(self, video_THWC: np.ndarray, sample: Sample) -> np.ndarray:
        """Mean and standard deviation over space and time of the last layer's channels, `(2 C,)`."""
        x = resampled(video_THWC, _FRAMES, _SIDE).unsqueeze(0)
        for weight in self.weights:
            x = F.leaky_relu(F.conv3d(x, weight, stride=2, padding=1), 0.2)
        flat = x[0].flatten(1)
        return torch.cat((flat.mean(1), flat.std(1))).double().numpy()


def resampled(video_THWC: np.ndarray, frames: int, side: int) -> Tensor:
    """Resample a video to `(C, frames, side, side)` in [-1, 1]: evenly spaced frames, repeated if it is shorter."""
    places = np.linspace(0, len(video_THWC) - 1, frames).round().astype(int)
    video_TCHW = to_unit(to_video(np.ascontiguousarray(video_THWC[places])))
    return F.interpolate(video_TCHW, (side, side), mode="bilinear", antialias=True).transpose(0, 1)


def distance_on(name: str, features: Callable[[np.ndarray, Sample], np.ndarray]) -> Distance:
    """Build the kernel and Frechet distances on the features `(D,)` that a function computes of a video."""
    return Distance(name, features, set_distances)


def _build_fixed(models: Models) -> Distance:
    return distance_on("random", FixedNetwork().features)


register("random", ("quick", "full"), _build_fixed)
