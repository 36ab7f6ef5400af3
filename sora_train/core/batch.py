"""Data types that are passed from shards to the training step, and the legend of the dimensions in tensor names.

    B batch          T frames            C channels       H height      W width
    N tokens of a pack    P values in a patch    D model width    E text width    K heads
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
    """Copy a tensor to `device` asynchronously; from the host to CUDA it goes through page-locked memory."""
    on_host = x.device.type == "cpu"
    locked = x.pin_memory() if on_host and device.type == "cuda" and not x.is_pinned() else x
    return locked.to(device, non_blocking=True)


@dataclass(frozen=True, slots=True)
class Visit:
    """One planned use of a sample: the clip to cut out of it, and the seed of all its random choices."""

    sample: int  # row in the index
    first: int  # number of the clip's first frame in the source
    frames: int
    fps: float  # of the clip, which may not be the source's; 0 for an image
    resize: tuple[int, int]  # height, width in pixels that the decoder delivers
    crop: tuple[int, int, int, int]  # top, left, height, width in pixels, cut out after the resize
    task: str
    seed: int  # 64 bits; noise, timestep and the choice of a caption all derive from it

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
    """The decoded result of a visit: pixels `video_TCHW` (uint8) and the caption drawn for this visit.

    A clip whose latents were computed before training has `latents_CTHW`, and zero frames in `video_TCHW`. If its
    text embeddings were computed too, `text_LE` holds that of its caption, then that of the empty caption.
    """

    visit: Visit
    key: str
    caption: str
    video_TCHW: Tensor
    latents_CTHW: Tensor | None = None
    text_LE: tuple[Tensor, Tensor] | None = None

    def moved(self, move: Callable[[Tensor], Tensor]) -> Clip:
        """Copy of the clip with `move` applied to each tensor."""
        latents = None if self.latents_CTHW is None else move(self.latents_CTHW)
        text = None if self.text_LE is None else (move(self.text_LE[0]), move(self.text_LE[1]))
        return Clip(self.visit, self.key, self.caption, move(self.video_TCHW), latents, text)


@dataclass
class Pack:
    """The clips of one forward pass: those of one slot, or of several slots run together. It may have no clips.

    `part` is `(i, n)` if n ranks share the tokens and this rank has number i (from 0): all n ranks have the same clips,
    and each counts an n-th of the loss.
    """

    clips: list[Clip]
    refused: list[Refusal] = field(default_factory=list)
    part: tuple[int, int] = (0, 1)

    def pin(self) -> Pack:
        """Move the pixels to page-locked memory, so that the copy to the device can overlap with work."""
        return Pack([clip.moved(Tensor.pin_memory) for clip in self.clips], self.refused, self.part)


@dataclass(frozen=True)
class Layout:
    """Token counts of a packed sequence, from which attention derives its groups.

    In self-attention, tokens attend to their own clip; in cross-attention, to its captions. The counts are plain
    integers on the host, so that no layer has to synchronise with the device to read them.

    Attributes:
        grids: Token grid (time, height, width) of each clip, in pack order.
        texts: Text tokens of each caption, in pack order.
        part: `(i, n)` under sequence parallelism: this rank's tensors hold the i-th of n equal parts of the tokens.
        shots: For clips with several captions, the latent frames that each caption of each clip covers. Empty where
            every clip has one caption.
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
        """Cumulative token counts: the offset of each clip, then the total (`cu_seqlens` on the host)."""
        return tuple(accumulate(self.lengths, initial=0))

    @property
    def tokens(self) -> int:
        """Tokens of the whole pack."""
        return self.offsets[-1]

    @property
    def mine(self) -> slice:
        """Slice of the pack's tokens that are in this rank's tensors."""
        place, parts = self.part
        size = self.tokens // parts
        return slice(place * size, (place + 1) * size)

    @cached_property
    def spans(self) -> tuple[int, ...]:
        """Tokens of the whole pack that attend to each caption, padding excluded."""
        if not self.shots:
            return self.lengths[: len(self.texts)]
        sizes = [height * width for _, height, width in self.grids]
        return tuple(frames * size for shots, size in zip(self.shots, sizes, strict=False) for frames in shots)

    @cached_property
    def queries(self) -> tuple[int, ...]:
        """Tokens of this rank's part that attend to each caption; padding counts towards the last caption."""
        first, last = self.mine.start, self.mine.stop
        ends = (*accumulate(self.spans[:-1]), self.tokens)
        return tuple(max(0, min(last, end) - max(first, start)) for start, end in zip((0, *ends), ends, strict=False))


@dataclass
class Stream:
    """The tokens of one modality in a pack. There is one, video; audio would be a second stream of the same clips.

    `first` is the row of the pack's token sequence at which the stream begins.
    """

    layout: Layout
    x_NP: Tensor  # noised latent patches
    target_NP: Tensor
    weight_N: Tensor  # loss weight of each token, 0 for given frames
    t_M: Tensor  # distinct timesteps of each clip, 0 of given frames among them
    t_of_N: Tensor  # index into t_M of each token's timestep
    level_N: Tensor  # timestep drawn for each token's frame, for given frames too: the bin of the loss by noise level
    clip_of_M: Tensor | None = None  # index of the caption that belongs to each timestep; used by model.pooled_text
    first: int = 0


@dataclass
class LatentPack:
    """Input of the diffusion model: noised tokens by stream, and the encoded captions."""

    streams: dict[str, Stream]
    text: Any  # ids_LR for the text encoder that is trained with the model, or embeddings text_LE of a frozen one
    ranks: int | None = None  # number of ranks that share the tokens; None: `parallel.sequence`

    @property
    def video(self) -> Stream:
        """The video stream, which every pack has."""
        return self.streams["video"]
