"""Generation of videos of any length in pieces, each of which continues the last latent frames of the previous one.

A piece is a clip of the trained length. It shares `overlap` latent frames with the previous piece: they start from the
same noise and follow its latents during denoising, the first of them until the last step, the others only in the early
steps, which fix the layout. Their details are then generated together with the frames that follow, and these versions
are shown, so that no seam separates two pieces. The first latent frame of a clip holds one frame, so that of a piece is
encoded from the last frame shown. Latents are decoded after those of the previous piece; older ones are dropped, so
memory use doesn't grow with the length. Objects that left the picture before the overlap are forgotten, unless pieces
also see an earlier frame (`sora_train.generation.memory`). A loop's last piece is held to the first one's beginning in
the same way.

A new shot is conditioned on the last frame of the previous shot, as an image-to-video clip is, so that its movement can
differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from sora_train.config.cost import geometry
from sora_train.config.schema import Config
from sora_train.core.cli import InputError
from sora_train.core.cost import Geometry
from sora_train.core.seeds import hash64
from sora_train.encoding.vae import FrozenVae
from sora_train.flow.ode import Held, Request, noise_of
from sora_train.generation.memory import BEFORE_OVERLAP, Memory, has_room
from sora_train.generation.requests import Prompt, Shot, Size, encode, encode_end, tail
from sora_train.generation.sampler import Sampler


def in_pieces(
    config: Config, sampler: Sampler, prompt: Prompt, size: Size, frames: int, seed: int,
    *, overlap: int, loop: bool, memory: bool = False,
) -> Iterator[np.ndarray]:  # fmt: skip
    """Generate a long video; yields the new frames `(T, H, W, 3)` uint8 of each piece.

    Frames that the prompt gives as the beginning are not part of the result.

    Args:
        config: Configuration of the model.
        sampler: The model.
        prompt: Captions and given frames.
        size: Frames, height and width of a piece.
        frames: Frames of the video.
        seed: Seed of the video.
        overlap: Latent frames that a piece shares with the previous one.
        loop: Whether the last piece leads back to the first frame and ends right before it. Pieces aren't cut then, so
            there may be a few more frames, and shots change within pieces.
        memory: Whether every piece after the first sees an earlier frame.

    Raises:
        InputError: The overlap leaves no room in a piece.
    """
    check_overlap(geometry(config).grid(*size)[0], overlap, memory=memory)
    if loop:
        yield from _continued(config, sampler, prompt, size, frames, seed, overlap=overlap, loop=True)
        return
    before = prompt.before
    earlier = Memory(None if before is None else before[0]) if memory else None
    for shot, first, last in _frames_of(prompt.shots, frames, config.data.made_fps):
        alone = replace(prompt, shots=[shot], before=before)
        own_seed = int(hash64(seed, first, last)) >> 1 if first else seed
        for video in _continued(
            config, sampler, alone, size, last - first, own_seed, overlap=overlap, loop=False, earlier=earlier
        ):
            yield video
            before = video[-1:]
            if earlier is not None:
                earlier.add(video[0])


def _frames_of(shots: Sequence[Shot], frames: int, fps: float) -> Iterator[tuple[Shot, int, int]]:
    """Iterate over the shots that the video shows: the shot, its first frame, and the frame after its last."""
    first = 0
    for number, end in enumerate(np.cumsum([shot.seconds for shot in shots])):
        last = frames if number == len(shots) - 1 else min(frames, round(end * fps))
        if last > first:
            yield shots[number], first, last
            first = last


def _continued(
    config: Config, sampler: Sampler, prompt: Prompt, size: Size, frames: int, seed: int,
    *, overlap: int, loop: bool, earlier: Memory | None = None,
) -> Iterator[np.ndarray]:  # fmt: skip
    """Generate pieces that continue each other: see `in_pieces`."""
    grid = geometry(config)
    latents, stride = grid.grid(*size)[0], grid.temporal_stride
    past, made, piece, back = _Past(), 0, 0, None
    if prompt.before is not None:
        past = _Past(encode(sampler.vae, tail(prompt.before, latents, grid)), last_HWC=prompt.before[-1])
    closing = (latents - 1 - overlap) * stride - 1 if loop else 0
    while made < frames - closing or (loop and made == 0):
        seen = None if earlier is None or past.last_HWC is None else earlier.recall(past.last_HWC)
        begins = replace(prompt, before=None if piece or seen is not None else prompt.before, most=overlap)
        request = _request(config, sampler.vae, begins, size, seed, piece, made=made, held=past.held)
        if seen is not None:
            request = past.with_memory(sampler.vae, request, seen, config)
        (whole_CTHW,) = sampler.latents([request])
        new_CTHW = whole_CTHW[:, _known(request) :]
        more = new_CTHW.shape[1] * stride - (stride - 1 if past.shown_CTHW is None else 0)
        if loop or made + more < frames:
            new_CTHW = new_CTHW[:, : new_CTHW.shape[1] - (overlap - 1)]
        video = past.decoded(sampler.vae, new_CTHW, stride)
        noise_CTHW = noise_of(request, config.vae.channels, config.model.patch)
        past = past.then(sampler.vae, new_CTHW, video, whole_CTHW, noise_CTHW, overlap)
        video = video if loop else video[: frames - made]
        if loop and back is None:
            back = _back(sampler.vae, prompt, whole_CTHW, noise_CTHW, video, overlap, grid=grid)
            yield video[back.skipped :]
        else:
            yield video
        made, piece = made + len(video), piece + 1
    if back is not None:
        request = _request(
            config, sampler.vae, replace(prompt, before=None), size, seed, piece, made=made, held=past.held
        )
        (whole_CTHW,) = sampler.latents([replace(request, held_end=back.held)])
        yield past.decoded(sampler.vae, whole_CTHW[:, 1 : latents - back.repeated], stride)[: back.last]


def check_overlap(latents: int, overlap: int, *, memory: bool) -> None:
    """Raise InputError if `overlap` exceeds half of a piece of `latents` latent frames, or a piece has fewer than 3.

    With `memory` a piece also needs room for the earlier frame.
    """
    if memory and not has_room(latents, overlap):
        raise InputError(f"memory and overlap={overlap} leave nothing to make in a piece of {latents} latent frames")
    if overlap > (latents - 1) // 2 and latents > 1:
        raise InputError(f"overlap={overlap} of a piece's {latents} latent frames; at most {(latents - 1) // 2}")
    if latents < 3:
        raise InputError(f"a piece has {latents} latent frame(s), too few to go on from; a model of longer clips can")


@dataclass(frozen=True)
class _Back:
    """Return of the last piece of a loop to the beginning."""

    held: Held  # overlap that the end of the last piece follows
    skipped: int  # frames at the beginning that aren't shown, as the last piece generates them again
    repeated: int  # latent frames at the last piece's end that repeat the shown beginning
    last: int | None  # end of the slice of its frames: the last frame may repeat the first one of the video


def _back(
    vae: FrozenVae, prompt: Prompt, whole_CTHW: Tensor, noise_CTHW: Tensor, video_THWC: np.ndarray, overlap: int,
    *, grid: Geometry,
) -> _Back:  # fmt: skip
    """Compute how the last piece leads back to the beginning of the loop, whose first piece is `whole_CTHW`.

    A generated beginning is treated like the overlap of two pieces: the video starts within it, and the last piece
    generates the frames before that point again. A given beginning is shown unchanged, so the last piece is held to it
    until the last step.
    """
    if prompt.opening is None:
        joint = slice(1, 1 + overlap)
        skipped = 1 + (overlap - 1) * grid.temporal_stride
        return _Back(Held(whole_CTHW[:, joint], noise_CTHW[:, joint]), skipped, 1, None)
    opening = np.concatenate((prompt.opening, video_THWC))[: 1 + overlap * grid.temporal_stride]
    latents_CTHW = encode_end(vae, opening, overlap, grid)[:, 1:]
    count = latents_CTHW.shape[1]
    return _Back(Held(latents_CTHW, noise_CTHW[:, 1 : 1 + count], release=False), 0, count, -1)


@dataclass(frozen=True)
class _Past:
    """State after a piece: the last latents shown `(C, T, H, W)`, the overlap for the next piece, the last frame shown.

    `held` is the overlap at a piece's beginning, its first latent frame encoded from the last frame shown. `own` is the
    overlap as the previous piece generated it, for pieces with memory, where it doesn't come first.
    """

    shown_CTHW: Tensor | None = None
    held: Held | None = None
    own: Held | None = None
    last_HWC: np.ndarray | None = None

    def with_memory(self, vae: FrozenVae, request: Request, seen_HWC: np.ndarray, config: Config) -> Request:
        """Add an earlier frame `(H, W, 3)` to the beginning of a piece's request, and move the overlap behind it.

        A new shot has no overlap; one latent frame that repeats the last frame shown takes its place.
        """
        own = self.own
        if own is None:
            assert self.last_HWC is not None, "a shot begins from a frame"
            still = np.repeat(self.last_HWC[None], 1 + config.vae.temporal_stride, axis=0)
            noise_CTHW = noise_of(request, config.vae.channels, config.model.patch)
            own = Held(encode(vae, still)[:, 1:], noise_CTHW[:, BEFORE_OVERLAP : BEFORE_OVERLAP + 1])
        return replace(request, given=((0, encode(vae, seen_HWC[None])),), held=replace(own, skipped=BEFORE_OVERLAP))

    def decoded(self, vae: FrozenVae, new_CTHW: Tensor, stride: int) -> np.ndarray:
        """Decode latents `(C, T, H, W)` that follow those shown; returns their frames `(T, H, W, 3)` uint8."""
        if self.shown_CTHW is None:
            return vae.decode(new_CTHW)
        return vae.decode(torch.cat((self.shown_CTHW, new_CTHW), dim=1))[-new_CTHW.shape[1] * stride :]

    def then(
        self, vae: FrozenVae, new_CTHW: Tensor, video_THWC: np.ndarray, whole_CTHW: Tensor, noise_CTHW: Tensor,
        overlap: int,
    ) -> _Past:  # fmt: skip
        """Return the state after a piece.

        Args:
            vae: Encodes the last frame shown.
            new_CTHW: Latents of the piece that are shown now; the last `overlap` - 1 of the piece are not yet.
            video_THWC: Their frames.
            whole_CTHW: All latents of the piece.
            noise_CTHW: The noise that they were generated from.
            overlap: Latent frames that the next piece shares with this one.
        """
        latents = whole_CTHW.shape[1]
        shown = new_CTHW if self.shown_CTHW is None else torch.cat((self.shown_CTHW, new_CTHW), dim=1)
        first_CTHW = encode(vae, video_THWC[-1:])
        own = Held(whole_CTHW[:, latents - overlap :], noise_CTHW[:, latents - overlap :])
        held_CTHW = torch.cat((first_CTHW, own.latents_CTHW[:, 1:]), dim=1)
        return _Past(shown[:, -latents:], Held(held_CTHW, own.noise_CTHW), own, video_THWC[-1])


def _request(
    config: Config, vae: FrozenVae, prompt: Prompt, size: Size, seed: int, piece: int, *, made: int, held: Held | None
) -> Request:
    """Build the request for piece number `piece`; its first frame is the last of the `made` frames so far."""
    own_seed = int(hash64(seed, piece)) >> 1 if piece else seed
    return replace(prompt.request(config, vae, size, own_seed, max(0, made - 1)), held=held)


def _known(request: Request) -> int:
    """Number of latent frames at a piece's beginning whose frames have been shown already."""
    if request.held is not None:
        return request.held.skipped + 1
    return sum(latents.shape[1] for first, latents in request.given if first == 0)
