"""The network of a diffusion run: text encoder and transformer as one module, so that one engine holds both."""

from __future__ import annotations

from torch import Tensor, nn

from sora_train.core.batch import LatentPack
from sora_train.models.text.encoder import TextEncoder
from sora_train.models.wan.model import DiT


class VideoModel(nn.Module):
    """Captions and noised patches to velocities. Without a text encoder the pack brings embeddings, not ids."""

    def __init__(self, dit: DiT, text: TextEncoder | None) -> None:
        super().__init__()
        self.dit, self.text = dit, text

    def forward(self, pack: LatentPack) -> Tensor:
        """Velocity `(N, P)` of every token of the pack."""
        dtype = self.dit.patch_in.weight.dtype
        text_LE = pack.text.to(dtype) if self.text is None else self.text(pack.text, pack.layout.texts)
        return self.dit(pack.x_NP.to(dtype), text_LE, pack.t_M, pack.t_of_N, pack.layout, pack.clip_of_M)
