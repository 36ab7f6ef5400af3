"""Metrics of the demo world: whether a video agrees with its scene, and its object's distance from the real one's."""

from __future__ import annotations

import numpy as np

from sora_train.demo_world.detect import sight
from sora_train.demo_world.judge import CHANCE, judge, only_objects
from sora_train.evaluation.metric import Sample, metric

_LOST = 1.0  # distance for a frame without the object, in shorter sides of the frame


@metric("scene", groups=("quick", "full", "completion"), better="up", needs=["scene"], summary="rate", chance=CHANCE)
def scene(made_THWC: np.ndarray, real_THWC: np.ndarray | None, sample: Sample) -> dict[str, float]:
    """1.0 for each attribute of the scene that the generated frames show correctly, else 0.0."""
    frames = made_THWC if sample.part is None else made_THWC[sample.part.made(len(made_THWC))]
    return {name: float(right) for name, right in judge(frames, sample.fields["scene"]).items()}


@metric("binding", groups=("quick", "full"), better="up", needs=["scene"], summary="rate")
def binding(made_THWC: np.ndarray, real_THWC: np.ndarray | None, sample: Sample) -> dict[str, float]:
    """1.0 if everything in a video of a BindingBench prompt is right, else 0.0; in total, by category and by degree."""
    if "category" not in sample.fields:
        return {}
    right = float(all(judge(made_THWC, sample.fields["scene"]).values()))
    names = ("binding", f"binding_{sample.fields['category']}", f"binding_degree_{sample.fields['degree']}")
    return dict.fromkeys(names, right)


@metric("path", groups=("completion",), better="down", needs=["real", "part", "scene"], summary="median")
def path(made_THWC: np.ndarray, real_THWC: np.ndarray | None, sample: Sample) -> dict[str, float]:
    """Distance of the demo world's object from its position in the real clip, in shorter sides of the frame."""
    assert real_THWC is not None and sample.part is not None
    inside = sample.part.made(len(real_THWC))
    return {"path": path_error(made_THWC[inside], real_THWC[inside])}


def path_error(made_THWC: np.ndarray, real_THWC: np.ndarray) -> float:
    """Mean distance between the object's centres in two videos of the same shape, in shorter sides of the frame.

    The mean is over the frames in which the real video shows an object; if the generated frame shows none, the distance
    counts as one side. NaN if the real video never shows an object. Raises ValueError for different shapes.
    """
    if made_THWC.shape != real_THWC.shape:
        raise ValueError(f"need two videos of one shape, got {made_THWC.shape} and {real_THWC.shape}")
    side = min(real_THWC.shape[1:3])
    distances = []
    for made, real in zip(made_THWC, real_THWC, strict=True):
        wanted, got = (only_objects([sight(frame)]) for frame in (real, made))
        if wanted and got:
            distances.append(np.hypot(wanted[0].y - got[0].y, wanted[0].x - got[0].x) / side)
        elif wanted:
            distances.append(_LOST)
    return float(np.mean(distances)) if distances else float("nan")
