"""Measures of clips that were completed from some of their own frames.

Given frames must be reproduced up to the error of the VAE, and generated frames must continue them without a jump.
"""

from __future__ import annotations

import numpy as np

from sora_train.core.cli import InputError, nearest
from sora_train.evaluation.metric import Part, Sample, metric
from sora_train.evaluation.motion import changes, seam_jumps
from sora_train.evaluation.pixels import psnr

TASKS = ("image_to_video", "extension", "extension_backwards", "interpolation")


def part_of(task: str, frames: int, stride: int) -> Part:
    """Determine the given part of a clip for a task: an image, half of the latent frames, or both ends.

    Args:
        task: Name of the task, one of `TASKS`.
        frames: Frames of the clip.
        stride: Temporal stride of the VAE.

    Raises:
        InputError: The task is unknown.
    """
    half = (1 + (frames - 1) // stride) // 2  # latent frames; the first encodes a single frame
    known = dict(zip(TASKS, (Part(1, 0), Part(1 + (half - 1) * stride, 0), Part(0, half * stride), Part(1, stride)),
                     strict=True))  # fmt: skip
    if task not in known:
        raise InputError(f"tasks={task}; {nearest(task, list(TASKS))}")
    return known[task]


def standing_still(real_THWC: np.ndarray, part: Part) -> np.ndarray:
    """Baseline: the clip with its generated part replaced by the given frame before it (else the one after)."""
    frames = real_THWC.copy()
    frames[part.made(len(frames))] = real_THWC[part.before - 1 if part.before else len(frames) - part.after]
    return frames


@metric("given", groups=("completion",), better="up", needs=["real", "part"], summary="median")
def given(made_THWC: np.ndarray, real_THWC: np.ndarray | None, sample: Sample) -> dict[str, float]:
    """PSNR of the given frames, in dB."""
    assert real_THWC is not None and sample.part is not None
    places = sample.part.given(len(real_THWC))
    return {"given_db": psnr(made_THWC[places], real_THWC[places])}


@metric("seam", groups=("completion",), better="down", needs=["part"], summary="median")
def seam(made_THWC: np.ndarray, real_THWC: np.ndarray | None, sample: Sample) -> dict[str, float]:
    """Change where given and generated frames meet, divided by the change at all other frames; 1: no difference."""
    assert sample.part is not None
    frames = len(made_THWC)
    seams = [at for at in (sample.part.before, frames - sample.part.after) if 0 < at < frames]
    return {"seam": seam_jumps(changes(made_THWC), seams)[0]}
