"""The latent spacetime diffusion transformer: Wan's block over packed clips, with a timestep per latent frame.

Self-attention with 3-D RoPE and QK-RMSNorm, cross-attention to text, adaLN modulation from the timestep and a
gelu-tanh MLP (Wan Team 2025, arXiv 2503.20314; Peebles and Xie 2022 for adaLN-zero; Chen et al. 2023, PixArt-alpha,
for one modulation shared by all blocks plus a table per block). The modulation is computed once per distinct
timestep and looked up per token. This is single-device code; ZeRO and sequence parallelism are applied from outside.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from sora_train.core.batch import Layout
from sora_train.core.cost import Shapes
from sora_train.models.layers.attention import host_lengths, packed_attention
from sora_train.models.layers.fused import ACTIVATIONS, gated_sum, modulated_norm, normed_heads
from sora_train.models.layers.rope import PLACE_FEATURES, UNSCALED, Factors, place_features, rotations
from sora_train.models.wan.settings import WanConfig


class DiT(nn.Module):
    """Predicts the velocity of every latent patch of a pack.

    `patch_features` is the number of values in one patch (height x width x channels, channels last). The keyword
    arguments are keys of `WanConfig` and described there.
    """

    def __init__(
        self,
        patch_features: int,
        width: int,
        depth: int,
        heads: int,
        ffn: int,
        text_width: int,
        *,
        frequencies: int = 256,
        rope_theta: float = 10000.0,
        gate_init: float = 0.0,
        absolute_positions: bool = False,
        pooled_text: bool = False,
        activation_checkpointing: str = "none",
        mlp_chunk: int = 0,
        attention: str = "auto",
        eps: float = 1e-6,
        rope_scaling: str = "none",
        rope_factors: Factors = UNSCALED,
        activation: str = "gelu",
    ) -> None:
        super().__init__()
        self.rope_scaling, self.rope_factors = rope_scaling, rope_factors
        self.head_dim, self.frequencies, self.rope_theta = width // heads, frequencies, rope_theta
        self.activation_checkpointing = activation_checkpointing
        self.patch_in = nn.Linear(patch_features, width)
        self.place_in = nn.Linear(PLACE_FEATURES, width) if absolute_positions else None
        self.text_in = nn.Sequential(nn.Linear(text_width, width), ACTIVATIONS[activation](), nn.Linear(width, width))
        self.text_pool = nn.Linear(text_width, width) if pooled_text else None
        self.time_in = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))
        modulation = nn.Linear(width, 6 * width)
        self.time_modulation = nn.Sequential(nn.SiLU(), modulation)
        block = partial(
            Block, width, heads, ffn, gate_init=gate_init, eps=eps, attention=attention, mlp_chunk=mlp_chunk,
            activation=activation,
        )  # fmt: skip
        self.blocks = nn.ModuleList(block() for _ in range(depth))
        self.out = Head(width, patch_features, eps)
        nn.init.zeros_(modulation.weight)
        nn.init.zeros_(modulation.bias)

    def forward(
        self,
        x_NP: Tensor,
        text_LE: Tensor,
        t_M: Tensor,
        t_of_N: Tensor,
        layout: Layout,
        clip_of_M: Tensor | None = None,
    ) -> Tensor:
        """Predict the velocity `(N, P)` of noised patches.

        Args:
            x_NP: Noised patches of all clips end to end.
            text_LE: Text embeddings of all captions end to end.
            t_M: Distinct timesteps; that of token n is `t_M[t_of_N[n]]`.
            t_of_N: Index into `t_M` of each token.
            layout: Token grids, caption lengths, and this rank's part of the tokens.
            clip_of_M: With `pooled_text`, the caption that each timestep's embedding is conditioned on.
        """
        x_ND, text_LD = self.patch_in(x_NP), self.text_in(text_LE)
        if self.place_in is not None:
            x_ND = x_ND + self.place_in(place_features(layout.grids, x_ND.device)[layout.mine].type_as(x_ND))
        time_MD = self.time_in(timestep_embedding(t_M, self.frequencies).type_as(x_ND))
        if self.text_pool is not None:
            time_MD = time_MD + self.text_pool(pooled(text_LE, layout.texts))[clip_of_M]
        modulation_M6D = self.time_modulation(time_MD).unflatten(-1, (6, -1))
        turns = rotations(
            layout.grids, self.head_dim, self.rope_theta, x_ND.device, self.rope_scaling, self.rope_factors
        )
        rope = tuple(x[layout.mine] for x in turns)
        groups = tuple(host_lengths(x) for x in (layout.lengths, layout.queries, layout.texts))
        for block in self.blocks:
            x_ND = self._run(block, x_ND, text_LD, modulation_M6D, t_of_N, rope, groups)
        return self.out(x_ND, time_MD, t_of_N)

    def _run(self, block: nn.Module, *arguments: Any) -> Tensor:
        """Run a block with activation checkpointing: save everything, attention's output only, or the input only."""
        if self.activation_checkpointing == "none" or not torch.is_grad_enabled():
            return block(*arguments)
        if self.activation_checkpointing == "block":
            return checkpoint(block, *arguments, use_reentrant=False)
        return checkpoint(block, *arguments, use_reentrant=False, context_fn=_keep_attention)


class Block(nn.Module):
    """Transformer block: self-attention, cross-attention and MLP; self-attention and MLP are modulated (adaLN)."""

    def __init__(
        self, width: int, heads: int, ffn: int, *, gate_init: float, eps: float, attention: str, mlp_chunk: int,
        activation: str,
    ) -> None:  # fmt: skip
        super().__init__()
        self.eps, self.mlp_chunk = eps, mlp_chunk
        self.self_attention = Attention(width, heads, eps, attention)
        self.cross_norm = nn.LayerNorm(width, eps)
        self.cross_attention = Attention(width, heads, eps, attention)
        self.mlp = nn.Sequential(nn.Linear(width, ffn), ACTIVATIONS[activation](), nn.Linear(ffn, width))
        gates = torch.tensor([0.0, 0.0, gate_init, 0.0, 0.0, gate_init])  # shift, scale, gate of attention, then of MLP
        self.modulation = nn.Parameter(gates.unsqueeze(1).repeat(1, width))

    def forward(
        self,
        x_ND: Tensor,
        text_LD: Tensor,
        modulation_M6D: Tensor,
        t_of_N: Tensor,
        rope: tuple[Tensor, Tensor],
        groups: tuple[Tensor, Tensor, Tensor],
    ) -> Tensor:
        """Apply the block, `(N, D)` to `(N, D)`.

        Args:
            x_ND: Video tokens.
            text_LD: Text tokens.
            modulation_M6D: Shift, scale and gate of self-attention and of the MLP, for each distinct timestep.
            t_of_N: Index of each token's timestep.
            rope: Cosines and sines of the tokens' angles.
            groups: On the host: tokens of each clip, tokens that attend to each caption, tokens of each caption.
        """
        clips, queries, texts = groups
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (modulation_M6D + self.modulation).unbind(1)
        h_ND = modulated_norm(x_ND, shift, scale, t_of_N, self.eps)
        x_ND = gated_sum(x_ND, self.self_attention(h_ND, h_ND, clips, clips, rope), gate, t_of_N)
        x_ND = x_ND + self.cross_attention(self.cross_norm(x_ND), text_LD, queries, texts)
        h_ND = modulated_norm(x_ND, mlp_shift, mlp_scale, t_of_N, self.eps)
        return gated_sum(x_ND, self._mlp(h_ND), mlp_gate, t_of_N)

    def _mlp(self, h_ND: Tensor) -> Tensor:
        """Apply the MLP, by chunks of tokens with `mlp_chunk`: its hidden activations are the block's largest."""
        if not 0 < self.mlp_chunk < len(h_ND):
            return self.mlp(h_ND)
        return torch.cat([checkpoint(self.mlp, part, use_reentrant=False) for part in h_ND.split(self.mlp_chunk)])


class Attention(nn.Module):
    """Multi-head attention between packed sequences, with RMSNorm of queries and keys over the full width.

    `attend` computes the output from queries, keys, values and the lengths of their groups; sequence parallelism
    replaces it.
    """

    def __init__(self, width: int, heads: int, eps: float, backend: str) -> None:
        super().__init__()
        self.heads = heads
        self.attend: Callable[..., Tensor] = partial(packed_attention, backend=backend)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.q_norm, self.k_norm = HeadsNorm(width, eps), HeadsNorm(width, eps)

    def forward(
        self,
        x_ND: Tensor,
        context_ND: Tensor,
        lengths: Tensor,
        context_lengths: Tensor,
        rope: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Attend from `x_ND` to `context_ND` within each group; `rope` rotates queries and keys."""
        q = self.q_norm(self.q(x_ND), self.heads, rope)
        k = self.k_norm(self.k(context_ND), self.heads, rope)
        v = self.v(context_ND).unflatten(-1, (self.heads, -1))
        return self.out(self.attend(q, k, v, lengths, context_lengths).flatten(1))


class HeadsNorm(nn.Module):
    """RMSNorm over the full width, followed by the split into heads and RoPE."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x_ND: Tensor, heads: int, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        """Normalise, split and rotate `(N, D)` to `(N, K, d)`."""
        return normed_heads(x_ND, self.weight, self.eps, heads, rope)


class Head(nn.Module):
    """Final modulated norm, and projection to patches, initialised with zeros."""

    def __init__(self, width: int, patch_features: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.modulation = nn.Parameter(torch.zeros(2, width))
        self.project = nn.Linear(width, patch_features)
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def forward(self, x_ND: Tensor, time_MD: Tensor, t_of_N: Tensor) -> Tensor:
        """Project `(N, D)` to `(N, P)`."""
        shift, scale = (time_MD.unsqueeze(1) + self.modulation).unbind(1)
        return self.project(modulated_norm(x_ND, shift, scale, t_of_N, self.eps))


def _keep_attention() -> tuple[Any, Any]:
    """Contexts for `checkpoint` that save the output of attention: expensive to recompute, and small."""
    kept = [torch.ops.sora_train.packed_attention.default]
    return create_selective_checkpoint_contexts(kept)


def pooled(text_LE: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Mean text embedding of each caption, `(S, E)`, with LayerNorm: means over more tokens have smaller norms."""
    means = torch.stack([part.float().mean(0) for part in text_LE.split(lengths)])
    return F.layer_norm(means, means.shape[-1:]).type_as(text_LE)


def timestep_embedding(t_M: Tensor, size: int) -> Tensor:
    """Sinusoidal embedding `(M, size)` fp32: cosines, then sines of 1000 t at frequencies 1 to 1/10000.

    Vaswani et al. 2017, section 3.5.
    """
    half = size // 2
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(half, device=t_M.device) / half)
    angles = 1000.0 * t_M.float().unsqueeze(1) * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=1)


def build_dit(config: WanConfig, shapes: Shapes) -> DiT:
    """Build the transformer of a configuration, randomly initialised."""
    m = config
    return DiT(
        shapes.patch_features, m.width, m.depth, m.heads, m.ffn, shapes.text_width,
        frequencies=m.frequencies, rope_theta=m.rope_theta, gate_init=m.gate_init,
        absolute_positions=m.absolute_positions, pooled_text=m.pooled_text,
        activation_checkpointing=m.activation_checkpointing, mlp_chunk=m.mlp_chunk, attention=m.attention,
        rope_scaling=m.rope_scaling, rope_factors=(m.rope_factors[0], m.rope_factors[1], m.rope_factors[2]),
        activation=m.activation,
    )  # fmt: skip
