"""The typed things that travel from shard to step, and the shape legend used in every tensor name.

    B batch          T frames            C channels       H height      W width
    N tokens of a pack    P numbers in a patch    D model width    E text width    K heads
    S clips of a pack     L text tokens of a pack     M distinct timesteps of a pack

Pixels are uint8 until the encoder; latents are normalised by the VAE's measured mean and deviation; times are
seconds, sizes are bytes, and a timestep t is in [0, 1] with 0 = data and 1 = noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

Grid = tuple[int, int, int]  # tokens in time, height, width


def send(x: Tensor, device: torch.device) -> Tensor:
    """A tensor on `device`, without waiting for what the device is doing: on the host that takes page-locked memory."""
    on_host = x.device.type == "cpu"
    locked = x.pin_memory() if on_host and device.type == "cuda" and not x.is_pinned() else x
    return locked.to(device, non_blocking=True)


@dataclass(frozen=True, slots=True)
class Visit:
    """One planned use of a sample: what to cut out of it, and the seed of everything random about it."""

    sample: int  # row in the index
    first: int  # first frame, a number of the source's
    frames: int
    fps: float  # real frames a second of the clip, which may not be the source's; 0 for an image
    resize: tuple[int, int]  # height, width the decoder delivers
    crop: tuple[int, int, int, int]  # top, left, height, width taken from that
    task: str
    seed: int  # 64 bits; noise, timestep, caption choice all derive from it

    @property
    def size(self) -> tuple[int, int, int]:
        """Frames, height, width of the clip."""
        return self.frames, self.crop[2], self.crop[3]


@dataclass(frozen=True, slots=True)
class Refusal:
    """A sample that could not be used: where it is and why."""

    sample: int
    shard: str
    key: str
    cause: str
    detail: str


@dataclass
class Clip:
    """What a visit brought back: pixels `video_TCHW` (uint8) and the caption drawn for this visit.

    A sample whose latents were computed before training brings `latents_CTHW` and no frame of pixels. With a frozen
    text encoder, `text_LE` holds the embedding of its caption, then of the empty caption.
    """

    visit: Visit
    key: str
    caption: str
    video_TCHW: Tensor
    latents_CTHW: Tensor | None = None
    text_LE: tuple[Tensor, Tensor] | None = None

    def moved(self, move: Callable[[Tensor], Tensor]) -> Clip:
        """The same clip with its tensors moved."""
        latents = None if self.latents_CTHW is None else move(self.latents_CTHW)
        text = None if self.text_LE is None else (move(self.text_LE[0]), move(self.text_LE[1]))
        return Clip(self.visit, self.key, self.caption, move(self.video_TCHW), latents, text)


@dataclass
class Pack:
    """The clips of one slot (or of several, run together), on their way to one forward pass. May hold no clip."""

    clips: list[Clip]
    refused: list[Refusal] = field(default_factory=list)

    def pin(self) -> Pack:
        """Move the pixels to page-locked memory, so that the copy to the device can overlap with work."""
        return Pack([clip.moved(Tensor.pin_memory) for clip in self.clips], self.refused)


@dataclass(frozen=True)
class Layout:
    """Who stands where in a pack, and who sees whom: tokens attend within their own clip, and to its own caption.

    `grids` holds the token grid of each clip and `texts` the number of its text tokens, both in pack order. Kept as
    plain integers on the host, so that no layer has to ask the device how long a clip is. Under sequence parallelism
    the tensors of a rank hold one of several equal parts of the tokens: `part` says which, and of how many. A clip of
    several shots has a caption for each: `shots` holds the latent frames of each shot of each clip; empty is one shot.
    """

    grids: tuple[Grid, ...]
    texts: tuple[int, ...]
    part: tuple[int, int] = (0, 1)
    shots: tuple[tuple[int, ...], ...] = ()

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each clip."""
        return tuple(t * h * w for t, h, w in self.grids)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each clip begins, and the total as the last entry (`cu_seqlens` on the host)."""
        return tuple(accumulate(self.lengths, initial=0))

    @property
    def tokens(self) -> int:
        """Tokens of the whole pack."""
        return self.offsets[-1]

    @property
    def mine(self) -> slice:
        """The tokens of this rank's part."""
        place, parts = self.part
        size = self.tokens // parts
        return slice(place * size, (place + 1) * size)

    @cached_property
    def spans(self) -> tuple[int, ...]:
        """Tokens that attend to each caption, in the whole pack without its padding."""
        if not self.shots:
            return self.lengths[: len(self.texts)]
        sizes = [height * width for _, height, width in self.grids]
        return tuple(frames * size for shots, size in zip(self.shots, sizes, strict=False) for frames in shots)

    @cached_property
    def queries(self) -> tuple[int, ...]:
        """Tokens of this part that attend to each caption; the padding of a pack counts for its last caption."""
        first, last = self.mine.start, self.mine.stop
        ends = (*accumulate(self.spans[:-1]), self.tokens)
        return tuple(max(0, min(last, end) - max(first, start)) for start, end in zip((0, *ends), ends, strict=False))


@dataclass
class Stream:
    """The tokens of one kind in a pack: video; audio would be another stream of the same clips.

    `layout` has the token grid of every clip; `first` is the row at which the stream begins in the pack's sequence.
    """

    layout: Layout
    x_NP: Tensor  # noised latent patches
    target_NP: Tensor
    weight_N: Tensor  # loss weight of each token, 0 for given frames
    t_M: Tensor  # distinct timesteps
    t_of_N: Tensor  # index of each token's timestep in t_M
    level_N: Tensor  # timestep of the clip's generated frames, for the loss by noise level
    clip_of_M: Tensor | None = None  # the caption that each timestep goes with (one a clip); pooled text asks for it
    first: int = 0


@dataclass
class LatentPack:
    """A pack as the diffusion model sees it: noised tokens by stream, and what the captions became."""

    streams: dict[str, Stream]
    text: Any  # ids_L2 for a text encoder trained along, or text_LE of a frozen one

    @property
    def video(self) -> Stream:
        """The stream that every pack has."""
        return self.streams["video"]
