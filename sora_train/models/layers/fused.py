"""Elementwise operations of a transformer block with hand-written backward passes.

Autograd would split each of these into about a dozen small operations and save the inputs of each. Here an operation
reads and writes its tensors a few times, and saves one wide tensor: its input, or the derivative for GELU. Statistics
are computed in fp32.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from sora_train.models.layers.rope import rotate

_aten = torch.ops.aten
_ROWS = 64  # rows per chunk on a CPU; chunks of a wide layer with their intermediate values fit into a core's cache


def modulated_norm(x_ND: Tensor, shift_MD: Tensor, scale_MD: Tensor, t_of_N: Tensor, eps: float) -> Tensor:
    """Apply LayerNorm (no affine part), then (1 + scale) and shift of each token's timestep (adaLN), `(N, D)`."""
    return _ModulatedNorm.apply(x_ND, shift_MD, scale_MD, t_of_N, eps)


def gated_sum(x_ND: Tensor, y_ND: Tensor, gate_MD: Tensor, t_of_N: Tensor) -> Tensor:
    """Compute x + gate * y with the gate of each token's timestep, `(N, D)`."""
    return _GatedSum.apply(x_ND, y_ND, gate_MD, t_of_N)


def normed_heads(x_ND: Tensor, weight_D: Tensor, eps: float, heads: int, rope: tuple[Tensor, Tensor] | None) -> Tensor:
    """Apply RMSNorm over the full width, split into heads, and apply RoPE. Returns `(N, K, d)`.

    `rope` holds cos and sin of the angles, `(N, d / 2)` each; None skips RoPE.
    """
    return _NormedHeads.apply(x_ND, weight_D, eps, heads, *(rope or (None, None)))


class Gelu(nn.Module):
    """GELU in its tanh form (Hendrycks and Gimpel 2016, arXiv 1606.08415)."""

    def forward(self, x_NF: Tensor) -> Tensor:
        """Apply GELU elementwise, any shape."""
        if x_NF.device.type == "cuda" and not torch.compiler.is_compiling():
            return F.gelu(x_NF, approximate="tanh")  # one kernel
        return _Gelu.apply(x_NF)


class _Gelu(Function):
    """GELU that saves its derivative instead of its input: both need the same exponential, computed once."""

    @staticmethod
    def forward(ctx: Any, x_NF: Tensor) -> Tensor:
        y_NF, slope_NF = (_value_and_slope if torch.compiler.is_compiling() else _by_rows)(x_NF)
        ctx.save_for_backward(slope_NF)
        return y_NF

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NF: Tensor) -> Tensor:
        """Multiply the gradient by the saved derivative of GELU."""
        return grad_NF * ctx.saved_tensors[0]


class SquaredRelu(nn.Module):
    """The square of ReLU (So et al. 2021, Primer, arXiv 2109.08668). On a CPU it takes a quarter of GELU's time."""

    def forward(self, x_NF: Tensor) -> Tensor:
        """Apply the squared ReLU elementwise, any shape."""
        return _SquaredRelu.apply(x_NF)


class _SquaredRelu(Function):
    @staticmethod
    def forward(ctx: Any, x_NF: Tensor) -> Tensor:
        root_NF = torch.relu(x_NF)
        ctx.save_for_backward(root_NF)
        return root_NF * root_NF

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NF: Tensor) -> Tensor:
        """Multiply the gradient by the derivative of the square of ReLU, 2 relu(x)."""
        return (grad_NF * ctx.saved_tensors[0]).mul_(2.0)


ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": Gelu, "relu2": SquaredRelu}  # of an MLP, by `model.activation`


@torch.library.custom_op("sora_train::gelu_and_slope", mutates_args=())
def _by_rows(x_NF: Tensor) -> tuple[Tensor, Tensor]:
    """GELU and its derivative, computed in chunks of `_ROWS` rows.

    A custom operator, so that a forecast's trace counts one operation: it may plan for a GPU, which needs no chunks.
    """
    y_NF, slope_NF = torch.empty_like(x_NF), torch.empty_like(x_NF)
    for x, y, slope in zip(*(t.split(_ROWS) for t in (x_NF, y_NF, slope_NF)), strict=True):
        for to, part in zip((y, slope), _value_and_slope(x), strict=True):
            to.copy_(part)
    return y_NF, slope_NF


@_by_rows.register_fake
def _(x_NF: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x_NF), torch.empty_like(x_NF)


def _value_and_slope(x_NF: Tensor) -> tuple[Tensor, Tensor]:
    """GELU and its derivative. As (1 + tanh u) / 2 = sigmoid(2 u), GELU(x) = x sigmoid(2 u(x))."""
    x, c = _full(x_NF), 2 * math.sqrt(2 / math.pi)
    square = x * x
    share = square.mul(0.044715 * c).add_(c).mul_(x).sigmoid_()
    y = x * share
    slope = square.mul_(3 * 0.044715 * c).add_(c).mul_(y)
    slope = slope.addcmul_(slope, share, value=-1).add_(share)
    return y.type_as(x_NF), slope.type_as(x_NF)


class _ModulatedNorm(Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, shift_MD: Tensor, scale_MD: Tensor, t_of_N: Tensor, eps: float) -> Tensor:
        normed_ND, mean_N1, inverse_N1 = torch.native_layer_norm(_full(x_ND), x_ND.shape[-1:], None, None, eps)
        ctx.save_for_backward(x_ND, mean_N1, inverse_N1, scale_MD, t_of_N)
        ctx.shift_dtype = shift_MD.dtype
        scale_ND = (1 + _full(scale_MD)).index_select(0, t_of_N)
        return normed_ND.mul_(scale_ND).add_(_full(shift_MD).index_select(0, t_of_N)).type_as(x_ND)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, mean_N1, inverse_N1, scale_MD, t_of_N = ctx.saved_tensors
        grad, x = _full(grad_ND), _full(x_ND)
        shift = scale = None
        if ctx.needs_input_grad[1]:
            shift = _sum_by_timestep(grad, t_of_N, len(scale_MD)).to(ctx.shift_dtype)
        if ctx.needs_input_grad[2]:
            scale = _sum_by_timestep((x - mean_N1).mul_(inverse_N1).mul_(grad), t_of_N, len(scale_MD))
            scale = scale.type_as(scale_MD)
        grad = (1 + _full(scale_MD)).index_select(0, t_of_N).mul_(grad)
        dx, _, _ = _aten.native_layer_norm_backward(
            grad, x, x.shape[-1:], mean_N1, inverse_N1, None, None, [True, False, False]
        )
        return dx.type_as(x_ND), shift, scale, None, None


class _GatedSum(Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, y_ND: Tensor, gate_MD: Tensor, t_of_N: Tensor) -> Tensor:
        ctx.save_for_backward(y_ND, gate_MD, t_of_N)
        return torch.addcmul(x_ND, gate_MD.index_select(0, t_of_N), y_ND)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        y_ND, gate_MD, t_of_N = ctx.saved_tensors
        gate = None
        if ctx.needs_input_grad[2]:
            gate = _sum_by_timestep(grad_ND * y_ND, t_of_N, len(gate_MD))
        return grad_ND, gate_MD.index_select(0, t_of_N).mul_(grad_ND), gate, None


class _NormedHeads(Function):
    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, weight_D: Tensor, eps: float, heads: int, cos: Tensor | None, sin: Tensor | None
    ) -> Tensor:
        x = _full(x_ND)
        mean_N1 = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1]
        inverse_N1 = (mean_N1 + eps).rsqrt()
        ctx.save_for_backward(x_ND, weight_D, inverse_N1, cos, sin)
        y_NKd = (x * inverse_N1).mul_(_full(weight_D)).unflatten(-1, (heads, -1))
        return (y_NKd if cos is None or sin is None else rotate(y_NKd, cos, sin)).type_as(x_ND)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NKd: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, weight_D, inverse_N1, cos, sin = ctx.saved_tensors
        x, weight = _full(x_ND), _full(weight_D)
        grad = _full(grad_NKd)
        grad = (grad if cos is None or sin is None else rotate(grad, cos, -sin)).flatten(1)
        along_ND = grad * x
        dweight = (inverse_N1.T @ along_ND)[0].type_as(weight_D) if ctx.needs_input_grad[1] else None
        back_N1 = (along_ND @ weight).unsqueeze(1) * inverse_N1**3 / x.shape[-1]
        dx = (grad * weight).mul_(inverse_N1).addcmul_(x, back_N1, value=-1)
        return dx.type_as(x_ND), dweight, None, None, None, None


def _full(x: Tensor) -> Tensor:
    """Cast to fp32, unless the tensor is wider already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _sum_by_timestep(rows_ND: Tensor, t_of_N: Tensor, count: int) -> Tensor:
    """Sum the rows of each timestep's tokens, `(M, D)`.

    Computed as a product with a one-hot matrix, because `index_add` into few rows would serialise on a GPU and isn't
    deterministic there.
    """
    each_M1 = torch.arange(count, device=rows_ND.device).unsqueeze(1)
    return (each_M1 == t_of_N).type_as(rows_ND) @ rows_ND
