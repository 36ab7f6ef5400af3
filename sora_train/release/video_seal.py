"""Mark by VideoSeal or a successor: a TorchScript network in a local file; nothing is fetched.

Fernandez et al. 2024, "Video Seal", arXiv 2412.09492. The file has the methods `embed(frames, bits)` and
`detect(frames)`, as the authors export them. The id's 48 bits are repeated to fill the network's message, and each is
multiplied by a keyed sign, so that messages of others aren't taken for marks of this key.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sora_train.core.cli import InputError
from sora_train.release.mark import BITS, PRESENT, Found

_AT_ONCE = 8  # frames in a batch
_LEAST = 128  # bits of a message


class VideoSeal:
    """A mark by a TorchScript network."""

    strengths = (1.0,)  # no choice: the network determines it

    def __init__(self, path: Path, key: bytes) -> None:
        """Load the network. Raises InputError for a file without such a network, or with too short a message."""
        try:
            self._network = torch.jit.load(str(path), map_location="cpu").eval()
            self._bits = int(self._detect(torch.zeros(1, 3, 256, 256)).shape[-1])
        except (RuntimeError, AttributeError, ValueError) as error:
            raise InputError(f"{path} is no TorchScript with embed and detect: {str(error).splitlines()[0]}") from error
        if self._bits < _LEAST:
            raise InputError(f"{path} carries {self._bits} bits; {_LEAST} are needed to tell a mark from chance")
        self.name = f"videoseal-{hashlib.sha256(path.read_bytes()).hexdigest()[:12]}"
        digest = hashlib.shake_256(key + b"videoseal").digest(self._bits)
        self._signs = np.array([1.0 if byte & 1 else -1.0 for byte in digest])

    def embedded(self, pieces: Iterable[np.ndarray], id: str, strength: float) -> Iterator[np.ndarray]:
        """Embed an id of 12 hexadecimal digits into frames `(T, H, W, 3)` uint8. `strength` is ignored."""
        bits = np.array([1.0 if bit == "1" else -1.0 for bit in f"{int(id, 16):0{BITS}b}"])
        message = torch.tensor(np.resize(bits, self._bits) * self._signs > 0, dtype=torch.float32)[None]
        for frames_THWC in pieces:
            marked = []
            for part in _parts(frames_THWC):
                with torch.no_grad():
                    made = self._network.embed(_tensor(part), message.expand(len(part), -1))
                marked.append((made.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy())
            yield np.concatenate(marked)

    def found(self, pieces: Iterable[np.ndarray]) -> Found:
        """Detect the mark of a video from the network's outputs, averaged over all frames."""
        total, count = np.zeros(self._bits), 0
        for frames_THWC in pieces:
            for part in _parts(frames_THWC):
                total += self._detect(_tensor(part)).sum(0).numpy()
                count += len(part)
        values = total / max(count, 1) * self._signs
        values = values / (np.sqrt(np.mean(values**2)) + 1e-9)
        rest = np.arange(self._bits) % BITS
        sums = np.bincount(rest, np.clip(values, -3, 3), BITS) / np.bincount(rest, minlength=BITS) ** 0.5
        id = int("".join("1" if s > 0 else "0" for s in sums), 2)
        strength = float(np.minimum(np.abs(sums), 3.0).sum())
        return Found(f"{id:0{BITS // 4}x}", strength, strength >= PRESENT)

    def _detect(self, frames: Tensor) -> Tensor:
        """Output of the network for each bit, `(T, bits)`: above 0 is a one."""
        with torch.no_grad():
            found: Tensor = self._network.detect(frames)
        return found[:, 1:]  # the first output is the network's score for any mark at all


def _parts(frames_THWC: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(frames_THWC), _AT_ONCE):
        yield frames_THWC[start : start + _AT_ONCE]


def _tensor(frames_THWC: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(frames_THWC)).permute(0, 3, 1, 2).float() / 255
