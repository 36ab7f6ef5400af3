"""Videos of any length, piece by piece: each goes on from the last frames of the one before.

A piece is a clip of the trained length. Its given beginning is encoded anew from the pixels before it, because the
first latent frame of a clip holds one frame alone. Only the overlap is kept, so memory doesn't grow with the length.
What has left the picture for longer than the overlap is forgotten.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from sora_train.cli import InputError
from sora_train.config import Config
from sora_train.cost import geometry
from sora_train.generation import Sampler
from sora_train.prompts import Prompt, Size, tail
from sora_train.seeds import hash64


def in_pieces(
    config: Config, sampler: Sampler, prompt: Prompt, size: Size, frames: int, seed: int, overlap: int, loop: bool
) -> Iterator[np.ndarray]:
    """frames_THWC uint8, `frames` of them in all, a piece at a time; `size` is a piece's.

    `overlap`: latent frames that a piece shares with the one before. With `loop` the last piece leads back to the first
    frame and ends right before it; pieces aren't cut then, so there may be a few more frames. What the prompt gives as
    beginning isn't repeated. Raises InputError for an overlap that leaves no room.
    """
    grid = geometry(config)
    latents = grid.grid(*size)[0]
    if overlap > (latents - 1) // 2 and latents > 1:
        raise InputError(f"overlap={overlap} of a piece's {latents} latent frames; at most {(latents - 1) // 2}")
    if latents < 3:
        raise InputError(f"a piece has {latents} latent frame(s), too few to go on from; a model of longer clips can")
    context, made, piece, opening = prompt.before, 0, 0, None
    closing = _new_frames(size, overlap, grid.temporal_stride, both=True) if loop else 0
    while made < frames - closing or (loop and made == 0):
        first = made - (0 if context is None else len(tail(context, overlap, grid)))
        goes_on = replace(prompt, before=_kept(context, overlap, config), most=overlap)
        new = _piece(config, sampler, goes_on, size, seed, piece, first)
        new = new if loop else new[: frames - made]
        opening = new[: 1 + overlap * grid.temporal_stride] if opening is None else opening
        together = new if context is None else np.concatenate((context, new))
        context = tail(together, overlap, grid)
        made, piece = made + len(new), piece + 1
        yield new
    if loop and opening is not None:
        ends = replace(prompt, before=_kept(context, overlap, config), after=opening, most=overlap)
        new = _piece(config, sampler, ends, size, seed, piece, made)
        yield new[:closing]


def _new_frames(size: Size, overlap: int, stride: int, both: bool) -> int:
    """Frames of a piece that are not given; between two ends the last one shows the first frame again."""
    beginning = 1 + (overlap - 1) * stride
    return size[0] - beginning - (overlap * stride + 1 if both else 0)


def _kept(context: np.ndarray | None, overlap: int, config: Config) -> np.ndarray | None:
    return None if context is None else tail(context, overlap, geometry(config))


def _piece(
    config: Config, sampler: Sampler, prompt: Prompt, size: Size, seed: int, piece: int, first: int
) -> np.ndarray:
    """The frames of a piece that follow its given beginning."""
    own_seed = int(hash64(seed, piece)) >> 1 if piece else seed
    request = prompt.request(config, sampler.vae, size, own_seed, max(0, first))
    (video,) = sampler.videos([request])
    return video if prompt.before is None else video[len(prompt.before) :]
