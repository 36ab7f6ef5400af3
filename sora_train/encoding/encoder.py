"""Latents and text embeddings of packs: computed now, read from a cache, or precomputed in the shard.

The objective receives latents in each case, and doesn't depend on their source.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from itertools import groupby

import torch
from torch import Tensor

from sora_train.core.batch import Clip, Pack, send
from sora_train.encoding.captions import Tokenize

Encode = Callable[[Tensor], Tensor]  # video_BCTHW uint8 to normalised latents_BCTHW


class Encoder:
    """Encodes the clips and captions of packs with the frozen VAE and text encoder of a run.

    Args:
        encode: Maps uint8 videos to normalised latents.
        tokenize: Maps captions to text rows.
        device: Device of the results.
        cache_bytes: Size of a cache of latents, keyed by a hash of the pixels; 0 is no cache.
    """

    def __init__(self, encode: Encode, tokenize: Tokenize, device: torch.device, cache_bytes: int = 0) -> None:
        self.encode, self.tokenize, self.device = encode, tokenize, device
        self._cache: dict[tuple[object, ...], Tensor] = {}
        self._cache_room = cache_bytes

    @torch.no_grad()
    def latents(self, pack: Pack) -> list[Tensor]:
        """Normalised latents `(C, T, H, W)` of each clip. Consecutive clips of one size are encoded as a batch.

        With a cache each clip is encoded alone: batching changes the last bits of the result, and a resumed run, whose
        cache is empty, must get the same latents.
        """
        if self._cache_room or self._cache:
            return [self._remembered(clip) for clip in pack.clips]
        latents: list[Tensor] = []
        for (_, ready), run in groupby(pack.clips, key=lambda clip: (clip.visit.size, clip.latents_CTHW is not None)):
            if ready:
                latents += [self._read(clip) for clip in run]
                continue
            videos = torch.stack([clip.video_TCHW.to(self.device, non_blocking=True) for clip in run])
            latents += self.encode(videos.transpose(1, 2)).unbind(0)
        return latents

    @torch.no_grad()
    def text(self, clips: Sequence[Clip], dropped: Sequence[bool]) -> tuple[Tensor, tuple[int, ...]]:
        """Text rows of all captions end to end on the device, and the length of each.

        Captions of `dropped` clips are replaced by the empty caption. A pack without clips gets one empty caption,
        because its single blank token needs text to attend to.
        """
        if not clips:
            rows, lengths = self.tokenize([""])
            return send(rows, self.device), lengths
        captions = ["" if drop else clip.caption for clip, drop in zip(clips, dropped, strict=True)]
        if all(clip.text_LE is None for clip in clips):
            rows, lengths = self.tokenize(captions)
            return send(rows, self.device), lengths
        parts = [
            self.tokenize([caption])[0] if clip.text_LE is None else clip.text_LE[int(drop)]
            for clip, caption, drop in zip(clips, captions, dropped, strict=True)
        ]
        return torch.cat([send(part, self.device) for part in parts]), tuple(map(len, parts))

    def _read(self, clip: Clip) -> Tensor:
        assert clip.latents_CTHW is not None
        return clip.latents_CTHW.to(self.device, non_blocking=True)

    def _remembered(self, clip: Clip) -> Tensor:
        if clip.latents_CTHW is not None:
            return self._read(clip)
        # keyed by content, because sample numbers of training and validation shards overlap
        pixels = clip.video_TCHW.cpu().contiguous().numpy()
        key = (hashlib.blake2b(pixels.data, digest_size=16).digest(), pixels.shape)
        if key not in self._cache:
            video_TCHW = clip.video_TCHW.to(self.device, non_blocking=True)
            latents_CTHW = self.encode(video_TCHW.transpose(0, 1).unsqueeze(0))[0]
            if self._cache_room < latents_CTHW.nbytes:
                return latents_CTHW
            self._cache_room -= latents_CTHW.nbytes
            self._cache[key] = latents_CTHW
        return self._cache[key]
